-- Writes the job's next instant into the due set: the earliest at which somebody must look at it.
local function schedule(due, job, id)
  local f = redis.call("HMGET", job, "state", "promote_at", "retry_at", "give_up_at", "abandon_at", "lease_until",
    "not_before")
  local state, at = f[1], nil
  local function earliest(instant)
    if instant > 0 and (not at or instant < at) then at = instant end
  end
  local function number(i) return tonumber(f[i] or 0) or 0 end
  if state == "scheduled" then
    earliest(math.max(number(7), number(3)))
    earliest(number(4))
    earliest(number(5))
  elseif state == "queued" then
    if number(2) > 0 then earliest(math.max(number(2), number(3))) end
    earliest(number(4))
    earliest(number(5))
  else
    earliest(number(6))
    earliest(number(5))
  end
  redis.call("ZADD", due, ms(at), id)
end
