-- What is said of an error in an event, which outlives its job: a runtime's own words may repeat the prompt. They stand
-- behind the first colon, or are all there is.
local function said_of(code, message)
  if code == "" then return "" end
  if code == "runtime_refused" or code == "context_length_exceeded" then return "the runtime refused the request" end
  return code == "runtime_failed" and string.match(message, "^[^:]*") or message
end
-- Owes the job's caller an event, where it wants one. It stands in the outbox as soon as the job has ended, so no crash
-- loses it; its id is the same however often it is delivered.
local function owe(root, job, f, now, id, to, code, message)
  if not f.webhook or f.webhook == "" then return end
  local told = redis.call("HMGET", job, "usage", "metadata")
  redis.call("XADD", root .. "outbox", "*", "id", "msg_" .. id .. "_" .. ms(now), "job", id, "caller", f.caller,
    "url", f.webhook, "type", "job." .. to, "ended_at", ms(now), "code", code, "message", said_of(code, message),
    "usage", told[1] or "", "metadata", told[2] or "")
end
