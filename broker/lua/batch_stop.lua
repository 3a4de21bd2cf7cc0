-- Says that a batch is to end early, cancelled or expired: nothing more is asked for. The first word counts.
--   KEYS[1] batch
--   ARGV[1] now            ARGV[2] batch_id  ARGV[3] ending       cancelled or expired
-- Returns the state of the batch.
-- Errors: NOBATCH.
--- @flags allow-oom
--- @include now_ms
--- @include batch_files
local now, b = now_ms(ARGV[1]), read_batch(KEYS[1])
if not b then return redis.error_reply("NOBATCH " .. ARGV[2]) end
if BATCH_ENDED[b.state] or (b.ending and b.ending ~= "") then return b.state end

local state = ARGV[3] == "cancelled" and "cancelling" or "finalizing"
redis.call("HSET", KEYS[1], "state", state, "ending", ARGV[3], state .. "_at", ms(now))
return state
