-- How many entries of a lane are being worked on. A lane that is empty or was never used has none.
local function pending(lane, group)
  if redis.call("XLEN", lane) == 0 then return 0 end
  return redis.call("XPENDING", lane, group)[1]
end
local function waiting(lane, group)
  local length = redis.call("XLEN", lane)
  if length == 0 then return 0 end
  return length - redis.call("XPENDING", lane, group)[1]
end
-- How many jobs may wait in the lane when one more asks: max(1 if nothing runs, max_queue + free), where free = slots of
-- warm hosts that nobody uses and that it may have: those kept for people are not batch work's, and its caller's key may
-- let `may_start` more run. KEYS[hosts_from .. hosts_to] are the model's hashes on its hosts, and
-- KEYS[lanes_from .. lanes_to] all lanes of that model, this one among them.
local function bound_of(group, max_queue, batch, may_start, hosts_from, hosts_to, lanes_from, lanes_to)
  local running, slots = 0, 0
  for i = lanes_from, lanes_to do running = running + pending(KEYS[i], group) end
  for i = hosts_from, hosts_to do
    local h = redis.call("HMGET", KEYS[i], "state", "slots_total", "slots_settling", "slots_kept")
    if h[1] == "warm" or h[1] == "degraded" then
      local kept = batch and tonumber(h[4] or 0) or 0
      slots = slots + math.max(0, tonumber(h[2] or 0) - tonumber(h[3] or 0) - kept)
    end
  end
  local bound = max_queue + math.max(0, math.min(slots - running, may_start))
  if running == 0 and bound < 1 then bound = 1 end
  return bound
end
