-- What a caller's files hold together: bytes and how many. Those whose time is over count no more; they are named too.
local function held_by_files(index, now)
  local bytes, files, over = 0, 0, {}
  local told = redis.call("HGETALL", index)
  for i = 1, #told, 2 do
    local size, til = string.match(told[i + 1], "^(%d+) (%d+)$")
    if tonumber(til) <= now then over[#over + 1] = told[i]
    else bytes, files = bytes + tonumber(size), files + 1 end
  end
  return bytes, files, over
end
-- Says what a file holds and until when it is kept, in its hash and in the index of its caller's files.
local function keep_file(file, parts, index, id, bytes, now, til)
  redis.call("HSET", file, "bytes", ms(bytes), "expires_at", ms(til))
  redis.call("HSET", index, id, ms(bytes) .. " " .. ms(til))
  for _, key in ipairs({ file, parts }) do redis.call("PEXPIRE", key, ms(til - now)) end
  if redis.call("PTTL", index) < til - now then redis.call("PEXPIRE", index, ms(til - now)) end
end
