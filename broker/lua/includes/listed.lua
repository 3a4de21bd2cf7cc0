-- A caller's list of its asynchronous jobs: `jobs:<caller>` has their ids, all with score 0, so that they stand in the order
-- in which they were made. Lines of a batch are not among them: it tells of its own. An id goes once its job is forgotten: each new one looks at the oldest few.
local LISTED_MAX, LISTED_LOOK, LISTED_AFTER_MS = 100000, 4, 86400000
local function list_job(root, caller, id, now, gone_at)
  local key = root .. "jobs:" .. caller
  redis.call("ZADD", key, "0", id)
  for _, other in ipairs(redis.call("ZRANGE", key, 0, LISTED_LOOK - 1)) do
    if other ~= id and redis.call("EXISTS", root .. "job:" .. other) == 0 then redis.call("ZREM", key, other) end
  end
  local over = redis.call("ZCARD", key) - LISTED_MAX
  if over > 0 then redis.call("ZREMRANGEBYRANK", key, 0, over - 1) end
  redis.call("PEXPIRE", key, ms(math.max(redis.call("PTTL", key), gone_at - now + LISTED_AFTER_MS)))
end
-- Which job tries the request of an ended one again, if one does that lives or is done; or why none may.
local function tried_again(root, old)
  local f = redis.call("HMGET", old, "state", "retried_as")
  if not f[1] then return nil, redis.error_reply("NOJOB " .. old) end
  if not ENDED[f[1]] or f[1] == "done" then return nil, redis.error_reply("NOTDEAD the job is " .. f[1]) end
  local state = f[2] and redis.call("HGET", root .. "job:" .. f[2], "state")
  if state and (not ENDED[state] or state == "done") then return f[2] end
end
-- Notes on an ended job which one tries its request again; its dead letter has been answered.
local function note_retry(root, old, id)
  redis.call("HSET", old, "retried_as", id)
  local letter = redis.call("HGET", old, "letter")
  if letter then redis.call("XDEL", root .. "dead", letter) end
end
