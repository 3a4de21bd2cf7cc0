-- Refuses a claim that would lead out a job which may not leave: without its consent, by another lane than it named,
-- with a half-told answer that it would have to go on from, which no rule has judged, or without a verdict on its
-- content under the rules in force. Returns nil where it may.
local function may_not_leave(job, id, zone, lane, rules)
  local f = redis.call("HMGET", job, "exits", "judged", "continues")
  local exits, judged = f[1] or "", f[2] or ""
  if zone ~= "remote" then return redis.error_reply("TRUSTZONE " .. id .. " may not leave the machine") end
  if exits ~= "" and not string.find(" " .. exits .. " ", " " .. lane .. " ", 1, true) then
    return redis.error_reply("TRUSTZONE " .. id .. " may not leave by lane " .. lane)
  end
  if tonumber(f[3] or 0) > 0 then return redis.error_reply("TRUSTZONE the answer begun of " .. id .. " may not leave") end
  if rules == "-" then return redis.error_reply("TRUSTZONE this runtime leads elsewhere than lane " .. lane) end
  if judged == "-" .. rules then return redis.error_reply("TRUSTZONE what " .. id .. " holds may not leave") end
  if judged ~= rules then return redis.error_reply("UNJUDGED " .. id .. " was not judged by the rules in force") end
end
-- Writes the record of what is about to leave, never a word of it. The oldest go with their time.
local function note_leaving(audit, job, now, keep_ms, fields)
  local f = redis.call("HMGET", job, "caller", "endpoint", "left")
  if f[2] then
    fields[#fields + 1] = "endpoint"
    fields[#fields + 1] = f[2]
  end
  redis.call("XADD", audit, "MINID", ms(now - keep_ms), "*", "at", ms(now), "caller", f[1], "left", f[3] or "",
    unpack(fields))
end
