-- Notes what an operator wants of a model, or what was learned of it.
--   KEYS[1] model
--   ARGV[1] now   ARGV[2] want_ms, 0 = it is not asked for   ARGV[3 ..] fields of the model and their values
-- Returns 1.
--- @flags allow-oom
--- @include now_ms
--- @include want
local now, want_ms = now_ms(ARGV[1]), tonumber(ARGV[2])

want(KEYS[1], now, want_ms)
for i = 3, #ARGV, 2 do redis.call("HSET", KEYS[1], ARGV[i], ARGV[i + 1]) end
return 1
