-- Adds a part to a file that is being sent, and makes the file with its first one. A part that comes twice is one.
--   KEYS[1] file           KEYS[2] parts     KEYS[3] files     of its caller
--   ARGV[1] now            ARGV[2] file_id   ARGV[3] number    of the part, from 0
--   ARGV[4] part           its bytes
--   ARGV[5] most_bytes     of all the caller's files           ARGV[6] most_files
--   ARGV[7] lifetime_ms    in which the next part or the end has to come
--   ARGV[8 ..] fields of the file's hash, name and value in turn
-- Returns the bytes that it holds now.
-- Errors: NOFILE, FILESFULL.
--- @include now_ms
--- @include files
local now, id, number = now_ms(ARGV[1]), ARGV[2], tonumber(ARGV[3])
local f = redis.call("HMGET", KEYS[1], "state", "bytes", "parts")
local bytes, parts = tonumber(f[2] or 0), tonumber(f[3] or 0)
if parts == number + 1 then return bytes end
if parts ~= number or (f[1] and f[1] ~= "sending") then return redis.error_reply("NOFILE " .. id) end
local held, files, over = held_by_files(KEYS[3], now)
if held + #ARGV[4] > tonumber(ARGV[5]) or (not f[1] and files >= tonumber(ARGV[6])) then
  return redis.error_reply("FILESFULL the caller has " .. files .. " files of " .. ms(held) .. " bytes")
end

for _, gone in ipairs(over) do redis.call("HDEL", KEYS[3], gone) end
if not f[1] then
  local fields = { "state", "sending", "created_at", ms(now) }
  for i = 8, #ARGV do fields[#fields + 1] = ARGV[i] end
  redis.call("HSET", KEYS[1], unpack(fields))
end
redis.call("RPUSH", KEYS[2], ARGV[4])
redis.call("HSET", KEYS[1], "parts", ms(number + 1))
keep_file(KEYS[1], KEYS[2], KEYS[3], id, bytes + #ARGV[4], now, now + tonumber(ARGV[7]))
return bytes + #ARGV[4]
