-- Ends a job, whatever ended it: leaves its lane, writes and publishes the terminal frame, counts, starts the keep time.
--   k: {job, lane, due, frames, request, readers, dead}   p: {group, frames_prefix, control_prefix, usage_prefix}
-- The terminal frame's bytes are JSON: {code, message, status?}; clients hear it in their own dialect's words.
local function close(k, p, now, id, to, code, message, status)
  local f = redis.call("HMGET", k.job, "entry", "attempt", "last_seq", "apis", "mode", "keep_ms", "idem", "lane",
    "owner", "state", "endpoint", "losses")
  local from = f[10]
  if f[1] and f[1] ~= "" then leave(k.lane, p.group, f[1]) end
  redis.call("ZREM", k.due, id)
  local seq = tonumber(f[3]) + 1
  local said = cjson.encode({ code = code, message = message, status = tonumber(status) })
  redis.call("XADD", k.frames, f[2] .. "-" .. seq, "kind", to, "data", said)
  redis.call("HSET", k.job, "state", to, "entry", "", "ended_at", ms(now), "last_seq", seq, "error", code,
    "error_message", message, "lease_until", "0")
  local keep = tonumber(f[6])
  redis.call("PEXPIRE", k.job, keep)
  redis.call("PEXPIRE", k.frames, keep)
  redis.call("DEL", k.readers)
  if f[5] == "sync" then redis.call("DEL", k.request) else redis.call("PEXPIRE", k.request, keep) end
  if f[7] and f[7] ~= "" then
    -- a failed, expired or cancelled job frees its Idempotency-Key; a done one keeps it for the keep time
    if to == "done" then redis.call("PEXPIRE", f[7], keep)
    elseif string.sub(redis.call("GET", f[7]) or "", 1, #id + 1) == id .. " " then redis.call("DEL", f[7]) end
  end
  publish(p.frames_prefix, f[4], id, f[2], seq, to, said)
  if (from == "claimed" or from == "streaming") and to == "cancelled" then
    redis.call("PUBLISH", p.control_prefix .. f[9], "cancel " .. id .. " " .. f[2])
  end
  if to == "failed" and code ~= "runtime_refused" and code ~= "context_length_exceeded" then
    redis.call("XADD", k.dead, "MAXLEN", "~", "10000", "*", "job", id, "lane", f[8], "code", code, "message", message,
      "losses", f[12])
  end
  usage(p.usage_prefix, now, "ended:" .. f[8] .. ":" .. to, 1)
end
