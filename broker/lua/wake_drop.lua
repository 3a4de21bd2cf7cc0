-- Gives the wake lock back, if it is still ours.
--   KEYS[1] lock
--   ARGV[1] holder
-- Returns 1 if it was ours.
--- @flags allow-oom
if redis.call("GET", KEYS[1]) ~= ARGV[1] then return 0 end

return redis.call("DEL", KEYS[1])
