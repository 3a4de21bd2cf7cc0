-- Takes a picture of one moment, and tells which: in microseconds, so that no other picture has the same.
--   KEYS[1] hosts
--   KEYS[2 ..] the models' own hashes, as many downgrades, as many zsets of sticky sessions, then the lanes
--   ARGV[1] now   ARGV[2] group   ARGV[3] host_prefix   ARGV[4] job_prefix   ARGV[5] models, how many
--   ARGV[6 ..] of each lane, how many of its oldest jobs are told
-- Returns now; the moment; the hosts: name, hash, …; those that fell silent: name, last heartbeat, …; of each model its
-- hash, then host, hash, …, then of its last jobs how many asked and are downgrades, and its sessions that stay on its
-- fallback; of each lane its jobs, those that a worker holds, when the one was submitted that has waited longest ("" = none
-- waits), and the told ones: the entry's fields, whether it is held, and of the record what `told_of` reads.
--- @flags no-writes
--- @include now_ms
--- @include look
local now, group = now_ms(ARGV[1]), ARGV[2]
local time = redis.call("TIME")
local moment = ARGV[1] == "0" and time[1] .. string.format("%06d", tonumber(time[2])) or ms(now * 1000)

local function value_of(entry, name)
  for i = 1, #entry, 2 do
    if entry[i] == name then return entry[i + 1] end
  end
  return ""
end
-- Who is in the index and does not live: a host that takes its leave is in it no more, and a day forgets the others.
local function hosts_silent(seen)
  local live, silent = {}, {}
  for i = 1, #seen, 2 do live[seen[i]] = true end
  local beats = redis.call("ZRANGE", KEYS[1], 0, -1, "WITHSCORES")
  for i = 1, #beats, 2 do
    if not live[beats[i]] then
      silent[#silent + 1] = beats[i]
      silent[#silent + 1] = beats[i + 1]
    end
  end
  return silent
end
-- How many more jobs of a caller may run, of which its key allows so many at once; -1 = any number.
local root, runs = string.sub(ARGV[4], 1, -#"job:" - 1), {}
local function may_start(caller, max_running)
  if max_running == 0 then return -1 end
  runs[caller] = runs[caller] or redis.call("ZCARD", root .. "runs:" .. caller)
  return math.max(0, max_running - runs[caller])
end
local function told_of(entry)
  local record = redis.call(
    "HMGET", ARGV[4] .. value_of(entry, "job"), "state", "owner", "attempt", "promotions", "promote_at", "give_up_at",
    "claimed_at", "first_token_at", "queued_at", "continue_by", "max_running"
  )
  for i = 1, 10 do record[i] = record[i] or "" end
  record[11] = may_start(value_of(entry, "caller"), tonumber(record[11] or 0))
  return record
end
-- Held jobs keep their entries, so of the first `held + 1` at least one waits. A job that was put back has an old submit
-- time and a new entry: who has waited longest is exact for as many jobs as are looked at.
local function line_of(lane, held, most)
  local holds, oldest, told = {}, "", {}
  if held > 0 then
    for _, row in ipairs(redis.call("XPENDING", lane, group, "-", "+", held)) do holds[row[1]] = true end
  end
  for i, entry in ipairs(redis.call("XRANGE", lane, "-", "+", "COUNT", math.max(most, held + 1))) do
    local id, fields = entry[1], entry[2]
    local submitted = not holds[id] and tonumber(value_of(fields, "submitted"))
    if submitted and (oldest == "" or submitted < oldest) then oldest = submitted end
    if i <= most then told[#told + 1] = { fields, holds[id] and 1 or 0, told_of(fields) } end
  end
  return oldest, told
end

local count, hosts, models, lanes = tonumber(ARGV[5]), hosts_seen(KEYS[1], ARGV[3], now), {}, {}
for i = 2, 1 + count do
  local seen, downgrades = model_seen(KEYS[i], hosts), redis.call("HMGET", KEYS[i + count], "asked", "downgraded")
  seen[3], seen[4] = tonumber(downgrades[1] or "0"), tonumber(downgrades[2] or "0")
  seen[5] = redis.call("ZCOUNT", KEYS[i + 2 * count], "(" .. ms(now), "+inf")
  models[#models + 1] = seen
end
for i = 2 + 3 * count, #KEYS do
  local length, held = lane_seen(KEYS[i], group)
  local oldest, told = "", {}
  if length > 0 then oldest, told = line_of(KEYS[i], held, tonumber(ARGV[5 + i - 1 - 3 * count])) end
  lanes[#lanes + 1] = { length, held, oldest, told }
end
return { now, moment, hosts, hosts_silent(hosts), models, lanes }
