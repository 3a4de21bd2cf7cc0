-- Takes a line out of a batch's window and writes what became of it, once, however often this is asked; the job that
-- answered it needs not to be kept any longer.
--   KEYS[1] batch          KEYS[2] window
--   KEYS[3] file           KEYS[4] parts     that get the line    KEYS[5] files        of its caller
--   KEYS[6] job            KEYS[7] frames    KEYS[8] request
--   ARGV[1] now            ARGV[2] batch_id  ARGV[3] file_id
--   ARGV[4] which          output, error, or "" = nobody is told of the line
--   ARGV[5] number         of the line       ARGV[6] text         what is written
--   ARGV[7] job_keep_ms
-- Returns 1, or 0 where it was done before.
-- Errors: NOBATCH, ENDED.
--- @flags allow-oom
--- @include now_ms
--- @include batch_files
local now, b = now_ms(ARGV[1]), read_batch(KEYS[1])
if not b then return redis.error_reply("NOBATCH " .. ARGV[2]) end
if BATCH_ENDED[b.state] then return redis.error_reply("ENDED " .. b.state) end
if redis.call("HEXISTS", KEYS[2], ARGV[5]) == 0 then return 0 end

redis.call("HDEL", KEYS[2], ARGV[5])
if ARGV[4] ~= "" then
  local k = { batch = KEYS[1], file = KEYS[3], parts = KEYS[4], files = KEYS[5] }
  append_line(k, b, ARGV[4], ARGV[3], now, ARGV[6])
  redis.call("HINCRBY", KEYS[1], ARGV[4] == "output" and "completed" or "failed", 1)
end
if tonumber(redis.call("HGET", KEYS[6], "ended_at") or 0) > 0 then
  for _, key in ipairs({ KEYS[6], KEYS[7], KEYS[8] }) do redis.call("PEXPIRE", key, ARGV[7]) end
end
return 1
