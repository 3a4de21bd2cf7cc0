-- Lets a retiring lane go once nothing waits or runs in it.
--   KEYS[1] lane   KEYS[2] policy
--   ARGV[1] lane_name
-- Returns 1 if the lane is gone, 0 while it still holds entries or was never retiring.
--- @flags allow-oom
local field = "retiring:" .. ARGV[1]
if redis.call("HEXISTS", KEYS[2], field) == 0 then return 0 end
if redis.call("XLEN", KEYS[1]) > 0 then return 0 end

redis.call("DEL", KEYS[1])
redis.call("HDEL", KEYS[2], field)
redis.call("HINCRBY", KEYS[2], "revision", 1)
return 1
