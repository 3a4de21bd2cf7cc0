-- Marks a job as streaming and logs its attempt's first frame, held role-only chunks included.
--   KEYS[1] job   KEYS[2] frames
--   ARGV[1] now   ARGV[2] id   ARGV[3] attempt   ARGV[4] seq, 1 or the one behind what stands   ARGV[5] data   ARGV[6] frames_prefix
-- The due set stays as it is: lease and readers go on.
-- Returns 1. A repeat after a lost reply is harmless: returns 0.
-- Errors: NOJOB, ENDED, STALE, BADTRANSITION, GAP.
--- @flags allow-oom
--- @include now_ms
--- @include check
--- @include publish
local id = ARGV[2]
local f = redis.call("HMGET", KEYS[1], "state", "attempt", "last_seq", "apis", "continues")
local refusal = holds(f[1], f[2], ARGV[3], KEYS[1])
if refusal then return refusal end
local seq, last = tonumber(ARGV[4]), tonumber(f[3])
if f[1] == "streaming" and seq <= last then return 0 end
local to, wrong = follow(f[1], "first_token", KEYS[1])
if not to then return wrong end
if seq ~= last + 1 then return redis.error_reply("GAP " .. last .. " then " .. ARGV[4]) end

redis.call("XADD", KEYS[2], ARGV[3] .. "-" .. ARGV[4], "kind", "content", "data", ARGV[5])
redis.call("HSET", KEYS[1], "state", to, "last_seq", ARGV[4])
if tonumber(f[5] or 0) == 0 then redis.call("HSET", KEYS[1], "first_token_at", ms(now_ms(ARGV[1]))) end
publish(ARGV[6], f[4], id, ARGV[3], ARGV[4], "content", ARGV[5])
return 1
