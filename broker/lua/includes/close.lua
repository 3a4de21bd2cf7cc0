--- @include owe
-- What `close` must know of a job, and what those who end it ask for besides (`...`), by name.
local function read_job(job, ...)
  local names = { "state", "lane", "entry", "attempt", "owner", "last_seq", "apis", "mode", "keep_ms", "idem", "losses",
    "caller", "model", "asked_model", "first_token_at", "first_token_by", "retries", "submitted_at", "not_before",
    "claimed_at", "held_ms", "continues", "webhook", "batch", ... }
  local f = {}
  for i, value in ipairs(redis.call("HMGET", job, unpack(names))) do f[names[i]] = value end
  return f
end
-- How a job did against the cold-start budget of the lane that it asked for: a first token in time or a late one, and
-- within how many ms, or none. "" where nobody judges: batch work, a client that left before the end.
local function judged(f, now, to, start)
  local first, by = tonumber(f.first_token_at or 0), tonumber(f.first_token_by or 0)
  if by == 0 or (first == 0 and to == "cancelled" and now <= by) then return "" end
  if first == 0 then return "/no_token" end
  return (first > by and "/late/" or "/in_time/") .. bucket_of(first - start)
end
-- Waits that are shorter count as none.
local WAITED_MS = 50
-- Counts a job that ends, once and whole, on the day of its end.
local function count_end(day, f, now, to, code)
  local by, start, ran = counted_by(f), math.max(f.submitted_at, f.not_before or 0), running_ms(f, now)
  local waited = now - ran - tonumber(f.held_ms or 0) - start
  count(day, by, now, (to == "failed" and "failed/" .. code or to) .. judged(f, now, to, start), 1)
  count(day, by, now, "running_ms", ran)
  if waited >= WAITED_MS then count(day, by, now, "queued_ms", waited) end
end
-- Whether a job is given up on and somebody should hear of it: not where a client that waited was told that its own
-- request is at fault, or waited in vain, and not where it is a line of a batch, whose error file says so.
local SAID_BY_RUNTIME = { runtime_refused = true, context_length_exceeded = true }
local function is_dead(f, to, code)
  if f.batch then return false end
  if f.mode == "async" then return to == "failed" or to == "expired" end
  return to == "failed" and not SAID_BY_RUNTIME[code]
end
-- Writes the dead letter of a job; returns its id. What a runtime said itself may repeat the prompt, and a letter outlives
-- the job: its words stand behind the first colon, or are all there is.
local function write_letter(dead, f, id, to, code, message)
  local why = code == "runtime_failed" and string.match(message, "^[^:]*") or message
  if SAID_BY_RUNTIME[code] then why = "the runtime refused the request" end
  return redis.call("XADD", dead, "MAXLEN", "~", "10000", "*", "job", id, "lane", f.lane, "code", code, "message", why,
    "losses", f.losses, "caller", f.caller, "model", f.model, "state", to, "mode", f.mode)
end
-- Ends a job, whatever ended it: leaves its lane, writes and publishes the terminal frame, counts, starts the keep time.
--   k: {job, lane, due, frames, request, readers, dead}   p: {group, frames_prefix, control_prefix, day}
--   `p.day` is what the names of the day's counters begin with.   f: `read_job`   ending: {code, message, status, set = more fields of the hash}
-- The terminal frame's bytes are JSON: {code, message, status?}; clients hear it in their own dialect's words.
local function close(k, p, f, now, id, to, ending)
  local code, message = ending.code, ending.message
  if f.entry and f.entry ~= "" then leave(k.lane, p.group, f.entry) end
  hold_no_more(root_of(k.job, id), f.caller, f.lane, id, f.state, f.not_before)
  redis.call("ZREM", k.due, id)
  local seq = ms(tonumber(f.last_seq) + 1)
  local said = code == "" and '{"code":"","message":""}'
    or cjson.encode({ code = code, message = message, status = tonumber(ending.status) })
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
  local letter = is_dead(f, to, code) and write_letter(k.dead, f, id, to, code, message)
  if letter then
    set[#set + 1] = "letter"
    set[#set + 1] = letter
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
  owe(root_of(k.job, id), k.job, f, now, id, to, code, message)
  if (f.state == "claimed" or f.state == "streaming") and to == "cancelled" then
    redis.call("PUBLISH", p.control_prefix .. f.owner, "cancel " .. id .. " " .. f.attempt)
  end
  count_end(p.day, f, now, to, code)
end
