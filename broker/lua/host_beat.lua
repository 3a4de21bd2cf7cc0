-- Says that a host is alive. One boot owns the name for as long as it beats.
--   KEYS[1] host   KEYS[2] hosts   KEYS[3 ..] the host's models
--   ARGV[1] now   ARGV[2] name   ARGV[3] boot   ARGV[4] lease_ms   ARGV[5] take, 1 = the old boot is proved dead
--   ARGV[6 ..] JSON objects of fields: the host's first, then one per model
-- Returns 1.
-- Errors: HELD.
--- @flags allow-oom
--- @include now_ms
local owner = redis.call("HGET", KEYS[1], "boot")
if owner and owner ~= ARGV[3] and ARGV[5] ~= "1" then return redis.error_reply("HELD " .. owner) end

for i = 1, #KEYS - 1 do
  local key = i == 1 and KEYS[1] or KEYS[i + 1]
  redis.call("DEL", key)
  for field, value in pairs(cjson.decode(ARGV[5 + i])) do redis.call("HSET", key, field, value) end
  redis.call("PEXPIRE", key, ARGV[4])
end
redis.call("ZADD", KEYS[2], ms(now_ms(ARGV[1])), ARGV[2])
return 1
