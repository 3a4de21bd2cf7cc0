-- Charges a caller for an answer that was cancelled in the middle: no end told what was computed for it, and a day's
-- tokens would be no bound for who hangs up before the last one.
--   KEYS[1] job
--   ARGV[1] now   ARGV[2] id   ARGV[3] attempt   ARGV[4] tokens, as estimated; each frame is one at least
-- Returns 1, or 0 where the job did not end so, or before its first token.
--- @flags allow-oom
--- @include now_ms
--- @include places
--- @include spent
local f = redis.call("HMGET", KEYS[1], "state", "attempt", "caller", "first_token_at", "last_seq")
if f[1] ~= "cancelled" or f[2] ~= ARGV[3] or tonumber(f[4] or 0) == 0 then return 0 end
spend(root_of(KEYS[1], ARGV[2]), f[3], now_ms(ARGV[1]), math.max(tonumber(ARGV[4]), tonumber(f[5]) - 1))
return 1
