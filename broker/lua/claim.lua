-- Gives one waiting job to a worker, by its entry, in any order.
--   KEYS[1] lane   KEYS[2] job   KEYS[3] due   KEYS[4] policy   KEYS[5] request
--   ARGV[1] now    ARGV[2] id    ARGV[3] group ARGV[4] lane_name   ARGV[5] entry   ARGV[6] policy_version
--   ARGV[7] host   ARGV[8] boot  ARGV[9] lease_ms   ARGV[10] target_trust  `local` or `remote`, of the lane's model now
-- Returns {attempt, body, the job's hash as name and value in turn}.
-- Errors: STALEPOLICY, NOJOB, ENDED, BADTRANSITION, MOVED, TRUSTZONE.
--- @include now_ms
--- @include check
--- @include schedule
local now, id = now_ms(ARGV[1]), ARGV[2]
local stale = same_policy(KEYS[4], ARGV[6])
if stale then return stale end
local to, refusal = check(KEYS[2], "claim")
if not to then return refusal end
local elsewhere = placed(KEYS[2], ARGV[4], ARGV[5])
if elsewhere then return elsewhere end
if ARGV[10] == "remote" and redis.call("HGET", KEYS[2], "zone") ~= "remote" then
  return redis.error_reply("TRUSTZONE " .. id .. " may not leave the machine")
end

redis.call("XCLAIM", KEYS[1], ARGV[3], ARGV[7], "0", ARGV[5], "FORCE", "JUSTID")
local attempt = redis.call("HINCRBY", KEYS[2], "attempt", 1)
redis.call("HSET", KEYS[2], "state", to, "owner", ARGV[7], "boot", ARGV[8], "claimed_at", ms(now),
  "lease_until", ms(now + tonumber(ARGV[9])), "last_seq", "0", "retry_at", "0")
schedule(KEYS[3], KEYS[2], id)
return { attempt, redis.call("GET", KEYS[5]), redis.call("HGETALL", KEYS[2]) }
