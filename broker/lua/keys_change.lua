-- Changes the callers and their keys, if nobody changed them since they were read.
--   KEYS[1] callers
--   ARGV[1] revision_read   ARGV[2 ..] fields and values in turn, "" = the field goes
-- Returns the new revision.
-- Errors: STALEPOLICY.
--- @flags allow-oom
local revision = redis.call("HGET", KEYS[1], "revision") or "0"
if revision ~= ARGV[1] then return redis.error_reply("STALEPOLICY callers " .. revision) end
for i = 2, #ARGV, 2 do
  if ARGV[i + 1] == "" then
    redis.call("HDEL", KEYS[1], ARGV[i])
  else
    redis.call("HSET", KEYS[1], ARGV[i], ARGV[i + 1])
  end
end
return redis.call("HINCRBY", KEYS[1], "revision", 1)
