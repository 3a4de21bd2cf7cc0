-- Writes the verdict on a waiting job's content: by which rules it was judged, and what of it would leave.
--   KEYS[1] job   KEYS[2] policy
--   ARGV[1] policy_version   ARGV[2] lane_name   ARGV[3] entry
--   ARGV[4] judged, the digest of the rules, with a `-` before it where the job may not leave
--   ARGV[5] leaves, the hash of the copy   ARGV[6] left, JSON for the audit record
-- Its consent (zone, exits) is not among what can be written: nobody gives it afterwards.
-- Returns 1.
-- Errors: STALEPOLICY, NOJOB, MOVED.
--- @include check
local stale = same_policy(KEYS[2], ARGV[1])
if stale then return stale end
local f = redis.call("HMGET", KEYS[1], "state", "lane", "entry")
if not f[1] then return redis.error_reply("NOJOB " .. KEYS[1]) end
local elsewhere = placed(f[2], f[3], ARGV[2], ARGV[3])
if elsewhere then return elsewhere end
if f[1] ~= "queued" then return redis.error_reply("MOVED " .. f[1]) end

redis.call("HSET", KEYS[1], "judged", ARGV[4], "leaves", ARGV[5], "left", ARGV[6])
return 1
