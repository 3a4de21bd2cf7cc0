-- Reads the hosts, the models on them and the lanes, all of one moment.
--   KEYS[1] hosts   KEYS[2 ..] the models' own hashes, then the lanes
--   ARGV[1] now   ARGV[2] group   ARGV[3] host_prefix   ARGV[4] models, how many
-- Returns now; the hosts: name, hash, …; of each model its hash, then host, hash, …; of each lane its jobs and those that
-- a worker holds.
--- @flags no-writes
--- @include now_ms
--- @include look
local now = now_ms(ARGV[1])
local hosts, models, lanes = hosts_seen(KEYS[1], ARGV[3], now), {}, {}
for i = 2, #KEYS do
  if i <= 1 + tonumber(ARGV[4]) then
    models[#models + 1] = model_seen(KEYS[i], hosts)
  else
    lanes[#lanes + 1] = { lane_seen(KEYS[i], ARGV[2]) }
  end
end
return { now, hosts, models, lanes }
