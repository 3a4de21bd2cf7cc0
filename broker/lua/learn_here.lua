-- Notes what a load showed of a model: on its host for a while, and for hosts that never loaded it. What it did not show
-- (0) leaves alone what another host's load showed of the same definition.
--   KEYS[1] learned   KEYS[2] model
--   ARGV[1] keep_ms   ARGV[2] footprint_bytes   ARGV[3] load_ms   ARGV[4] definition
-- Returns 1.
--- @flags allow-oom
local same = redis.call("HGET", KEYS[2], "definition") == ARGV[4]

local learned = { "footprint_bytes", ARGV[2], "load_ms", ARGV[3], "definition", ARGV[4] }
redis.call("HSET", KEYS[1], unpack(learned))
for i = 1, #learned, 2 do
  if not (same and tonumber(learned[i + 1]) == 0) then redis.call("HSET", KEYS[2], learned[i], learned[i + 1]) end
end
redis.call("PEXPIRE", KEYS[1], ARGV[1])
return 1
