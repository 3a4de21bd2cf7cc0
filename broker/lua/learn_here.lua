-- Notes what a load showed of a model: on its host for a while, and for hosts that never loaded it.
--   KEYS[1] learned   KEYS[2] model
--   ARGV[1] keep_ms   ARGV[2] footprint_bytes   ARGV[3] load_ms   ARGV[4] definition
-- Returns 1.

local learned = { "footprint_bytes", ARGV[2], "load_ms", ARGV[3], "definition", ARGV[4] }
redis.call("HSET", KEYS[1], unpack(learned))
redis.call("HSET", KEYS[2], unpack(learned))
redis.call("PEXPIRE", KEYS[1], ARGV[1])
return 1
