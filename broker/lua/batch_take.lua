-- Moves a batch's place in its file past some lines: the good ones are in its window from here on, and each of the others
-- is a line of its error file. Who read from a place that another has moved on is refused.
--   KEYS[1] batch          KEYS[2] window    KEYS[3] names
--   KEYS[4] file           KEYS[5] parts     of its errors        KEYS[6] files        of its caller
--   ARGV[1] now            ARGV[2] batch_id  ARGV[3] file_id      of its errors
--   ARGV[4] from           lines taken before                     ARGV[5] taken        lines taken after
--   ARGV[6] part           ARGV[7] offset    where the next line begins
--   ARGV[8] read_all       1 = there is none
--   ARGV[9 ..] of each line its number, the digest of its name or "", what the window says of it or "", its error or ""
-- Returns the state of the batch.
-- Errors: NOBATCH, ENDED, MOVED.
--- @include now_ms
--- @include batch_files
local now, b = now_ms(ARGV[1]), read_batch(KEYS[1])
if not b then return redis.error_reply("NOBATCH " .. ARGV[2]) end
if BATCH_ENDED[b.state] then return redis.error_reply("ENDED " .. b.state) end
if b.taken ~= ARGV[4] then return redis.error_reply("MOVED " .. b.taken) end
if b.ending ~= "expired" and b.ending and b.ending ~= "" then return redis.error_reply("MOVED " .. b.state) end

local k = { batch = KEYS[1], file = KEYS[4], parts = KEYS[5], files = KEYS[6] }
local left, failed = math.max(1, redis.call("PTTL", KEYS[1])), 0
for i = 9, #ARGV, 4 do
  if ARGV[i + 1] ~= "" then redis.call("ZADD", KEYS[3], ARGV[i], ARGV[i + 1]) end
  if ARGV[i + 2] ~= "" then redis.call("HSET", KEYS[2], ARGV[i], ARGV[i + 2]) end
  if ARGV[i + 3] ~= "" then
    append_line(k, b, "error", ARGV[3], now, ARGV[i + 3])
    failed = failed + 1
  end
end
for _, key in ipairs({ KEYS[2], KEYS[3] }) do redis.call("PEXPIRE", key, left) end
redis.call("HSET", KEYS[1], "taken", ARGV[5], "part", ARGV[6], "offset", ARGV[7], "read_all", ARGV[8])
if failed > 0 then redis.call("HINCRBY", KEYS[1], "failed", failed) end
if b.state == "validating" then
  b.state = "in_progress"
  redis.call("HSET", KEYS[1], "state", b.state, "in_progress_at", ms(now))
end
return b.state
