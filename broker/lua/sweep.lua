-- Repairs one lane: entries whose job is gone, ended or elsewhere leave it, and what is gone holds no place of its caller's
-- any more; a waiting or held job that fell out of the due set is put back into it; consumers that hold nothing and have
-- been silent for an hour are forgotten.
--   KEYS[1] lane   KEYS[2] due
--   ARGV[1] group   ARGV[2] lane_name   ARGV[3] job_prefix   ARGV[4] from   ARGV[5] count
-- Returns {the id to go on from or "", entries removed, instants restored}.
--- @flags allow-oom
--- @include now_ms
--- @include schedule
--- @include places
if redis.call("EXISTS", KEYS[1]) == 0 then return { "", 0, 0 } end
local group = ARGV[1]

local removed, restored = 0, 0
local root = string.sub(ARGV[3], 1, -5)
local entries = redis.call("XRANGE", KEYS[1], ARGV[4], "+", "COUNT", ARGV[5])
for _, entry in ipairs(entries) do
  local id, caller
  for i = 1, #entry[2], 2 do
    if entry[2][i] == "job" then id = entry[2][i + 1] elseif entry[2][i] == "caller" then caller = entry[2][i + 1] end
  end
  local job = ARGV[3] .. tostring(id)
  local f = redis.call("HMGET", job, "state", "lane", "entry")
  if not f[1] or f[2] ~= ARGV[2] or f[3] ~= entry[1] then
    redis.call("XACK", KEYS[1], group, entry[1])
    redis.call("XDEL", KEYS[1], entry[1])
    removed = removed + 1
    if not f[1] and id and caller then
      hold_no_more(root, caller, ARGV[2], id, "queued")
      hold_no_more(root, caller, ARGV[2], id, "claimed")
    end
  elseif not redis.call("ZSCORE", KEYS[2], id) then
    schedule(KEYS[2], job, id)
    restored = restored + 1
  end
end
if #entries < tonumber(ARGV[5]) then
  for _, consumer in ipairs(redis.call("XINFO", "CONSUMERS", KEYS[1], group)) do
    local c = {}
    for i = 1, #consumer, 2 do c[consumer[i]] = consumer[i + 1] end
    if tonumber(c.pending) == 0 and tonumber(c.idle) > 3600000 then
      redis.call("XGROUP", "DELCONSUMER", KEYS[1], group, c.name)
    end
  end
  return { "", removed, restored }
end
return { "(" .. entries[#entries][1], removed, restored }
