-- What `close` must know of a job, and what those who end it ask for besides, by name.
local function read_job(job)
  local names = { "state", "lane", "entry", "attempt", "owner", "last_seq", "apis", "mode", "keep_ms", "idem", "losses",
    "caller", "model", "seen", "lease_until", "boot", "asked_model", "first_token_at", "first_token_by", "retries",
    "continues" }
  local f = {}
  for i, value in ipairs(redis.call("HMGET", job, unpack(names))) do f[names[i]] = value end
  return f
end
-- How a job did against the cold-start budget of the lane that it asked for: a first token in time from the model asked
-- for, or from another one, a late one, or none. nil where nobody judges: batch work, a client that left before the end.
local function judged(f, now, to)
  local first, by = tonumber(f.first_token_at or 0), tonumber(f.first_token_by or 0)
  if by == 0 or (first == 0 and to == "cancelled" and now <= by) then return nil end
  if first == 0 then return "none" end
  return first > by and "late" or f.model == f.asked_model and "asked" or "other"
end
-- Ends a job, whatever ended it: leaves its lane, writes and publishes the terminal frame, counts, starts the keep time.
--   k: {job, lane, due, frames, request, readers, dead}   p: {group, frames_prefix, control_prefix, usage_prefix}
--   f: `read_job`   ending: {code, message, status, set = more fields of the hash, counts = more of `usage`}
-- The terminal frame's bytes are JSON: {code, message, status?}; clients hear it in their own dialect's words.
local function close(k, p, f, now, id, to, ending)
  local code, message, counts = ending.code, ending.message, ending.counts or {}
  if f.entry and f.entry ~= "" then leave(k.lane, p.group, f.entry) end
  redis.call("ZREM", k.due, id)
  local seq = ms(tonumber(f.last_seq) + 1)
  local said = cjson.encode({ code = code, message = message, status = tonumber(ending.status) })
  redis.call("XADD", k.frames, f.attempt .. "-" .. seq, "kind", to, "data", said)
  local set = ending.set or {}
  for _, x in ipairs({ "state", to, "entry", "", "ended_at", ms(now), "last_seq", seq, "lease_until", "0" }) do
    set[#set + 1] = x
  end
  if code ~= "" then
    for _, x in ipairs({ "error", code, "error_message", message }) do set[#set + 1] = x end
  end
  if f.retries and f.retries ~= "" then
    local index, fingerprint = string.match(f.retries, "^(%S+) (%S+)$")
    local heard = redis.call("ZCOUNT", k.readers, "(" .. ms(now), "+inf") > 0
    settle_retries(index, now, fingerprint, id, to == "done" and not heard)
  end
  redis.call("HSET", k.job, unpack(set))
  redis.call("PEXPIRE", k.job, f.keep_ms)
  redis.call("PEXPIRE", k.frames, f.keep_ms)
  if f.mode == "sync" then
    redis.call("DEL", k.readers, k.request)
  else
    redis.call("DEL", k.readers)
    redis.call("PEXPIRE", k.request, f.keep_ms)
  end
  if f.idem and f.idem ~= "" then
    -- a failed, expired or cancelled job frees its Idempotency-Key; a done one keeps it for the keep time
    if to == "done" then redis.call("PEXPIRE", f.idem, f.keep_ms)
    elseif string.sub(redis.call("GET", f.idem) or "", 1, #id + 1) == id .. " " then redis.call("DEL", f.idem) end
  end
  publish(p.frames_prefix, f.apis, id, f.attempt, seq, to, said)
  if (f.state == "claimed" or f.state == "streaming") and to == "cancelled" then
    redis.call("PUBLISH", p.control_prefix .. f.owner, "cancel " .. id .. " " .. f.attempt)
  end
  if to == "failed" and code ~= "runtime_refused" and code ~= "context_length_exceeded" then
    redis.call("XADD", k.dead, "MAXLEN", "~", "10000", "*", "job", id, "lane", f.lane, "code", code, "message", message,
      "losses", f.losses)
  end
  counts[#counts + 1] = "ended:" .. f.lane .. ":" .. to
  counts[#counts + 1] = 1
  local how = judged(f, now, to)
  if how then
    counts[#counts + 1] = "first_token:" .. f.asked_model .. ":" .. how
    counts[#counts + 1] = 1
  end
  usage(p.usage_prefix, now, unpack(counts))
end
