-- Changes the callers and their keys, if nobody changed them since they were read; what a caller that goes leaves behind
-- goes in the same step, since its name may be another's next.
--   KEYS[1] callers   KEYS[2 ..] what goes with it
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
for i = 2, #KEYS do redis.call("DEL", KEYS[i]) end
return redis.call("HINCRBY", KEYS[1], "revision", 1)
