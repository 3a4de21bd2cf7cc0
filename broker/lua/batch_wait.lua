-- Says in a batch what its lines wait for that nothing takes now, or that they wait for nothing any more.
--   KEYS[1] batch
--   ARGV[1] batch_id   ARGV[2] wait   {code, message} as JSON, "" = for nothing
-- Returns the state of the batch.
-- Errors: NOBATCH, ENDED.
--- @flags allow-oom
--- @include now_ms
--- @include batch_files
local b = read_batch(KEYS[1])
if not b then return redis.error_reply("NOBATCH " .. ARGV[1]) end
if BATCH_ENDED[b.state] then return redis.error_reply("ENDED " .. b.state) end

redis.call("HSET", KEYS[1], "wait", ARGV[2])
return b.state
