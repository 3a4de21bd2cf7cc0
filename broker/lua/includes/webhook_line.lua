-- Says when somebody should look at an endpoint next: when its first delivery is due, but not while its breaker is open.
local function look_at(endpoints, due, breaker, endpoint)
  local first = redis.call("ZRANGE", due, 0, 0, "WITHSCORES")
  if #first == 0 then
    redis.call("ZREM", endpoints, endpoint)
  else
    local open_until = tonumber(redis.call("HGET", breaker, "open_until") or 0)
    redis.call("ZADD", endpoints, ms(math.max(tonumber(first[2]), open_until)), endpoint)
  end
end
-- Puts a delivery behind those of its job that are pending; only the first of them is due.
local function line_up(line, due, delivery, now)
  local last = redis.call("ZREVRANGE", line, 0, 0, "WITHSCORES")
  redis.call("ZADD", line, ms(tonumber(last[2] or 0) + 1), delivery)
  if #last == 0 then redis.call("ZADD", due, ms(now), delivery) end
end
