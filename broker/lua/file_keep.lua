-- Ends a file that was sent: it is whole, and is kept. Done twice is done once.
--   KEYS[1] file           KEYS[2] parts     KEYS[3] files     of its caller
--   ARGV[1] now            ARGV[2] file_id   ARGV[3] parts     how many it has
--   ARGV[4] lines          ARGV[5] filename  ARGV[6] keep_ms   from when it was begun
-- Returns 1.
-- Errors: NOFILE.
--- @include now_ms
--- @include files
local now, id = now_ms(ARGV[1]), ARGV[2]
local f = redis.call("HMGET", KEYS[1], "state", "bytes", "parts", "created_at")
if not f[1] or f[3] ~= ARGV[3] then return redis.error_reply("NOFILE " .. id) end
if f[1] == "sent" then return 1 end

redis.call("HSET", KEYS[1], "state", "sent", "lines", ARGV[4], "filename", ARGV[5])
keep_file(KEYS[1], KEYS[2], KEYS[3], id, tonumber(f[2]), now, tonumber(f[4]) + tonumber(ARGV[6]))
return 1
