-- The hosts that have told of themselves within the last minute and still live: name, hash, name, hash, …
local function hosts_seen(hosts, host_prefix, now)
  local told = {}
  for _, name in ipairs(redis.call("ZRANGEBYSCORE", hosts, now - 60000, "+inf")) do
    local hash = redis.call("HGETALL", host_prefix .. name)
    if #hash > 0 then
      told[#told + 1] = name
      told[#told + 1] = hash
    end
  end
  return told
end
-- A model: what is known of it wherever it runs, then its hash on each of these hosts that has one.
local function model_seen(model, hosts)
  local there = {}
  for i = 1, #hosts, 2 do
    local hash = redis.call("HGETALL", model .. ":" .. hosts[i])
    if #hash > 0 then
      there[#there + 1] = hosts[i]
      there[#there + 1] = hash
    end
  end
  return { redis.call("HGETALL", model), there }
end
-- How many jobs a lane holds, and how many of them a worker holds: none where somebody took its group away by hand.
local function lane_seen(lane, group)
  local length = redis.call("XLEN", lane)
  if length == 0 then return 0, 0 end
  local held = redis.pcall("XPENDING", lane, group)
  return length, held.err and 0 or held[1]
end
