-- Ends a job because nobody wants it, in any live state; tells the worker that holds it.
--   KEYS[1] job   KEYS[2] lane   KEYS[3] due   KEYS[4] frames   KEYS[5] request   KEYS[6] readers   KEYS[7] dead
--   ARGV[1] now   ARGV[2] id   ARGV[3] group   ARGV[4] frames_prefix   ARGV[5] control_prefix   ARGV[6] usage_prefix
--   ARGV[7] lane_name   ARGV[8] entry   ARGV[9] only   "abandoned" = if its readers and their grace are gone,
--     "unread" = if nobody reads it, "" = in any case
--   ARGV[10] message
-- Returns the state in which the job was.
-- Errors: NOJOB, ENDED, MOVED, NOTDUE.
--- @flags allow-oom
--- @include now_ms
--- @include check
--- @include publish
--- @include enter
--- @include usage
--- @include retries
--- @include close
local now, id = now_ms(ARGV[1]), ARGV[2]
local f = read_job(KEYS[1])
local to, refusal = follow(f.state, "cancel", KEYS[1])
if not to then return refusal end
local elsewhere = placed(f.lane, f.entry, ARGV[7], ARGV[8])
if elsewhere then return elsewhere end
if ARGV[9] == "unread" and redis.call("ZCOUNT", KEYS[6], "(" .. ms(now), "+inf") > 0 then
  return redis.error_reply("NOTDUE read again")
end
if ARGV[9] == "abandoned" then
  local abandon_at = tonumber(redis.call("HGET", KEYS[1], "abandon_at") or 0)
  if abandon_at == 0 or abandon_at > now then return redis.error_reply("NOTDUE read until " .. ms(abandon_at)) end
end

close({ job = KEYS[1], lane = KEYS[2], due = KEYS[3], frames = KEYS[4], request = KEYS[5], readers = KEYS[6],
  dead = KEYS[7] },
  { group = ARGV[3], frames_prefix = ARGV[4], control_prefix = ARGV[5], usage_prefix = ARGV[6] },
  f, now, id, to, { code = "cancelled", message = ARGV[10] })
return f.state
