-- Notes that a model is asked for, which wakes it and keeps it awake for `for_ms` at least. Every request says so: a
-- quarter more is written at a time, that most of them have nothing to write.
local function want(model, now, for_ms)
  if for_ms > 0 and now + for_ms > tonumber(redis.call("HGET", model, "wanted_until") or 0) then
    redis.call("HSET", model, "wanted_until", ms(now + for_ms + math.floor(for_ms / 4)))
  end
end
