-- The earliest of some instants; 0 and nil are instants that never come.
local function earliest(...)
  local at
  for i = 1, select("#", ...) do
    local instant = tonumber((select(i, ...)) or 0) or 0
    if instant > 0 and (not at or instant < at) then at = instant end
  end
  return at
end
-- Writes the job's next instant into the due set: the earliest at which somebody must look at it.
local function schedule(due, job, id)
  local f = redis.call("HMGET", job, "state", "promote_at", "retry_at", "give_up_at", "abandon_at", "lease_until",
    "not_before", "continue_by")
  local promote_at, retry_at = tonumber(f[2] or 0) or 0, tonumber(f[3] or 0) or 0
  local at
  if f[1] == "scheduled" then
    at = earliest(math.max(tonumber(f[7]), retry_at), f[4], f[5])
  elseif f[1] == "queued" and tonumber(f[8] or 0) > 0 then -- half of its answer is told
    at = earliest(f[8], f[5])
  elseif f[1] == "queued" then
    at = earliest(promote_at > 0 and math.max(promote_at, retry_at), f[4], f[5])
  else
    at = earliest(f[6], f[5])
  end
  redis.call("ZADD", due, ms(at), id)
end
