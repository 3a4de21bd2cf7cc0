-- Drops a file, unless a batch that has not ended reads or writes it.
--   KEYS[1] file           KEYS[2] parts     KEYS[3] files     of its caller
--   ARGV[1] file_id
-- Returns 1.
-- Errors: NOFILE, FILEINUSE.
--- @flags allow-oom
local f = redis.call("HMGET", KEYS[1], "id", "uses")
if not f[1] then return redis.error_reply("NOFILE " .. ARGV[1]) end
if tonumber(f[2] or 0) > 0 then
  return redis.error_reply("FILEINUSE " .. ARGV[1] .. " is in use by a batch: cancel that first")
end

redis.call("UNLINK", KEYS[1], KEYS[2])
redis.call("HDEL", KEYS[3], ARGV[1])
return 1
