-- Gives one waiting job to a worker, by its entry, in any order. Where that leads out of the machine, the job's consent
-- and the verdict on its content are asked here, and the audit record is written here: none leaves without one.
--   KEYS[1] lane   KEYS[2] job   KEYS[3] due   KEYS[4] policy   KEYS[5] request   KEYS[6] audit
--   ARGV[1] now    ARGV[2] id    ARGV[3] group ARGV[4] lane_name   ARGV[5] entry   ARGV[6] policy_version
--   ARGV[7] host   ARGV[8] boot  ARGV[9] lease_ms
--   ARGV[10] target_trust  `local` or `remote`   ARGV[11] target_model   of the lane, under the active policy
--   ARGV[12] rules         digest of those in force for that model, `-` = this runtime leads elsewhere
--   ARGV[13] provider      its address           ARGV[14] audit_ms   how long records are kept
--   ARGV[15] woke_at       when the model's last wake was over, 0 = its worker found it awake
-- Returns {attempt, claimed_at, body, and of the job's hash: zone, endpoint, stream, include_usage, choices, mode,
-- priority, session, tokens, put_backs, continues, last_seq, leaves, trace}. A job that `continues` goes on counting behind its
-- last frame.
-- Errors: STALEPOLICY, NOJOB, ENDED, BADTRANSITION, MOVED, TRUSTZONE, UNJUDGED, CALLERBUSY.
--- @include now_ms
--- @include check
--- @include schedule
--- @include places
--- @include leaving
local now, id = now_ms(ARGV[1]), ARGV[2]
local stale = same_policy(KEYS[4], ARGV[6])
if stale then return stale end
local f = redis.call("HMGET", KEYS[2], "state", "lane", "entry", "zone", "attempt", "abandon_at", "endpoint", "stream",
  "include_usage", "choices", "mode", "priority", "session", "tokens", "continues", "last_seq", "leaves",
  "caller", "max_running", "put_backs", "trace")
local to, refusal = follow(f[1], "claim", KEYS[2])
if not to then return refusal end
if f[2] ~= ARGV[4] or f[3] ~= ARGV[5] then return redis.error_reply("MOVED " .. f[2] .. " " .. f[3]) end
if ARGV[10] == "remote" then
  local stays = may_not_leave(KEYS[2], id, f[4], ARGV[4], ARGV[12])
  if stays then return stays end
end
local root, max_running = root_of(KEYS[2], id), tonumber(f[19] or 0)
if max_running > 0 and redis.call("ZCARD", root .. "runs:" .. f[18]) >= max_running then
  return redis.error_reply("CALLERBUSY " .. f[18] .. " runs " .. max_running .. " jobs")
end

redis.call("XCLAIM", KEYS[1], ARGV[3], ARGV[7], "0", ARGV[5], "FORCE", "JUSTID")
local attempt, last = tonumber(f[5] or 0) + 1, "0"
if tonumber(f[15] or 0) > 0 then
  last = f[16]
  redis.call("HSET", KEYS[2], "continue_by", "0")
end
local lease_until = now + tonumber(ARGV[9])
redis.call("HSET", KEYS[2], "state", to, "model", ARGV[11], "attempt", attempt, "owner", ARGV[7], "boot", ARGV[8],
  "claimed_at", ms(now), "lease_until", ms(lease_until), "last_seq", last, "retry_at", "0", "woke_at", ARGV[15])
redis.call("ZADD", KEYS[3], ms(earliest(lease_until, f[6])), id)
hold_no_more(root, f[18], f[2], id, f[1])
hold_running(root, f[18], id, now)
if ARGV[10] == "remote" then
  note_leaving(KEYS[6], KEYS[2], now, tonumber(ARGV[14]), { "job", id, "attempt", attempt, "lane", ARGV[4],
    "model", ARGV[11], "provider", ARGV[13], "host", ARGV[7], "rules", ARGV[12] })
end
return { attempt, ms(now), redis.call("GET", KEYS[5]), f[4], f[7], f[8], f[9], f[10], f[11], f[12], f[13], f[14],
  f[20], f[15], last, f[17], f[21] }
