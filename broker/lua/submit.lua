-- Accepts a job into a lane, or, with a later start, into the schedule. Keyed by the job's id: sending it again is harmless.
--   KEYS[1] lane           KEYS[2] job       KEYS[3] request   KEYS[4] due      KEYS[5] readers
--   KEYS[6] idem           KEYS[7] policy    KEYS[8] model
--   KEYS[9] downgrades     KEYS[10] sticky   both of the model asked for
--   KEYS[11] retries       of the job's session
--   KEYS[12 ..] the model's hashes on its hosts, then all lanes of the model
--   ARGV[1] now            ARGV[2] id        ARGV[3] group     ARGV[4] policy_version
--   ARGV[5] max_queue      ARGV[6] promote_after_ms, 0 = never ARGV[7] give_up_after_ms, counted from its start
--   ARGV[8] not_before     0 = now           ARGV[9] body      ARGV[10] body_hash
--   ARGV[11] keyed         1 = it has an Idempotency-Key, which lives as long as the job; its end starts the keep time
--   ARGV[12] reader        `api/reader` or "" ARGV[13] reader_lease_ms
--   ARGV[14] hosts         number of keys    ARGV[15] wanted_for_ms, 0 = do not wake
--   ARGV[16] first_token_within_ms, counted from its start, 0 = nobody judges it
--   ARGV[17] max_share     of downgrades, 1 = no cap           ARGV[18] window     ARGV[19] binding_from
--   ARGV[20] sticky_ms     0 = its session does not stay on a fallback
--   ARGV[21] fingerprint   by which an SDK's retry finds the job, "" = it does not
--   ARGV[22] max_waiting   of the caller, over all lanes, 0 = no limit
--   ARGV[23] tokens_per_day  of the caller, 0 = no limit
--   ARGV[24] refused_by    names of the lanes that had no place for it just now: its caller waits in their lines no more
--   ARGV[25 ..] fields of the job hash, name and value in turn
-- As many jobs of a caller may be to start later in a lane as may wait in it. They count as waiting from their start on.
-- While others want places of the lane, no caller holds more than its share of them. Who asks is noted either way.
-- An asynchronous job is noted in its caller's list. One that tries another's request again (`retry_of`) is noted on that
-- one, whose dead letter goes.
-- Jobs of the same session that nobody reads any more and that asked for something else end: their grace is over.
-- Returns {"queued"|"scheduled", entry}, {"known", lane} for an id sent again, {"attached", id} for a repeated key,
-- or where the request is tried again already.
-- A line of a batch that is to end, or that was written already, is nobody's wish any more: who asks looked too long ago.
-- Errors: STALEPOLICY, IDEMMISMATCH, NOJOB, NOTDEAD, ENDED, CALLERLIMIT, QUOTA, LANEFULL, SCHEDULEFULL, CALLERSHARE, DOWNGRADES.
--- @include now_ms
--- @include check
--- @include schedule
--- @include enter
--- @include want
--- @include downgrade
--- @include retries
--- @include share
--- @include spent
--- @include listed
--- @include batch_line_wanted
local now, id, group = now_ms(ARGV[1]), ARGV[2], ARGV[3]
local hosts = tonumber(ARGV[14])
local known = redis.call("HGET", KEYS[2], "state")
if known then return { "known", redis.call("HGET", KEYS[2], "lane") } end
local stale = same_policy(KEYS[7], ARGV[4])
if stale then return stale end
local not_before = tonumber(ARGV[8])
if ARGV[11] == "1" then
  local held = redis.call("GET", KEYS[6])
  if held then
    local other, hash = string.match(held, "^(%S+) (%S+)$")
    local there = redis.call("EXISTS", string.sub(KEYS[2], 1, -#id - 1) .. tostring(other)) == 1
    if there and hash ~= ARGV[10] then return redis.error_reply("IDEMMISMATCH job " .. other) end
    if there then return { "attached", other } end
  end
end
local named, fields = {}, {}
for i = 25, #ARGV, 2 do
  named[ARGV[i]] = ARGV[i + 1]
  fields[#fields + 1] = ARGV[i]
  fields[#fields + 1] = ARGV[i + 1]
end
local root, who = root_of(KEYS[2], id), named.caller
if named.batch and not worked_off(root, named.batch, id) then return redis.error_reply("ENDED " .. named.batch) end
local old = named.retry_of and root .. "job:" .. named.retry_of
if old then
  local again, refusal = tried_again(root, old)
  if refusal then return refusal end
  if again then return { "attached", again } end
end
local max_waiting, tokens_per_day = tonumber(ARGV[22]), tonumber(ARGV[23])
if not_before <= now and waits_as_may(root, who, max_waiting) then return redis.error_reply("CALLERLIMIT " .. who) end
if tokens_per_day > 0 and spent_today(root, who, now) >= tokens_per_day then
  return redis.error_reply("QUOTA " .. ms(next_day(now) - now))
end
if not_before <= now then
  local none = no_place(KEYS[1], group, tonumber(ARGV[5]), root, named.lane, who, now, named.priority, named.max_running,
    12, 11 + hosts, 12 + hosts, #KEYS)
  if none then return none end
elseif waiting_of(root, "@" .. named.lane, who) >= math.max(1, tonumber(ARGV[5])) then
  return redis.error_reply("SCHEDULEFULL " .. KEYS[1] .. " " .. ms(first_start(root, named.lane, who) - now))
end
local downgrade, max_share, window = named.asked_model ~= named.model, tonumber(ARGV[17]), tonumber(ARGV[18])
if downgrade and max_share < 1 and not may_downgrade(KEYS[9], nil, max_share, window, tonumber(ARGV[19])) then
  return redis.error_reply("DOWNGRADES " .. named.asked_model)
end

if named.session ~= "" and ARGV[12] ~= "" then
  local own = -#id - 1
  local job_prefix, readers_prefix = string.sub(KEYS[2], 1, own), string.sub(KEYS[5], 1, own)
  for _, member in ipairs(redis.call("ZRANGEBYSCORE", KEYS[11], "+inf", "+inf")) do
    local fingerprint, other = string.match(member, "^([^/]+)/(.+)$")
    local job, readers = job_prefix .. other, readers_prefix .. other
    local grace = tonumber(redis.call("HGET", job, "grace_ms") or -1)
    if fingerprint ~= ARGV[21] and grace >= 0 and redis.call("ZCOUNT", readers, "(" .. ms(now), "+inf") == 0 then
      redis.call("DEL", readers)
      redis.call("HSET", job, "abandon_at", ms(now))
      schedule(KEYS[4], job, other)
    end
  end
end
local give_up_at = math.max(now, not_before) + tonumber(ARGV[7])
local promote_at = tonumber(ARGV[6]) > 0 and math.min(now + tonumber(ARGV[6]), give_up_at) or 0
local abandon_at = 0
local function set(field, value)
  fields[#fields + 1] = field
  fields[#fields + 1] = value
end
if ARGV[12] ~= "" then
  local ends = now + tonumber(ARGV[13])
  redis.call("ZADD", KEYS[5], ms(ends), ARGV[12])
  local grace = tonumber(named.grace_ms)
  if grace >= 0 then abandon_at = ends + grace end
  set("apis", string.match(ARGV[12], "^[^/]+"))
  set("abandon_at", ms(abandon_at))
end
set("submitted_at", ms(now))
set("give_up_at", ms(give_up_at))
set("promote_at", ms(promote_at))
set("policy_version", ARGV[4])
if ARGV[16] ~= "0" then set("first_token_by", ms(math.max(now, not_before) + tonumber(ARGV[16]))) end
if max_share < 1 then set("asked_number", count_asked(KEYS[9], window, downgrade)) end
if downgrade then stick(KEYS[10], named.session, now, tonumber(ARGV[20])) end
local state, entry = "queued", ""
if not_before > now then
  state = "scheduled"
  set("not_before", ms(not_before))
  set("max_waiting", ARGV[22])
  redis.call("ZADD", KEYS[4], ms(earliest(not_before, give_up_at, abandon_at)), id)
else
  entry = add_entry(KEYS[1], group, id, named.caller, named.session, ms(promote_at), ms(now), named.tokens,
    named.priority, named.zone)
  set("entry", entry)
  set("queued_at", ms(now))
  redis.call("ZADD", KEYS[4], ms(earliest(promote_at, give_up_at, abandon_at)), id)
end
set("state", state)
if not_before <= now then note_place(root, named.lane, who, now) end
for lane in string.gmatch(ARGV[24], "%S+") do leave_line(root, lane, who) end
hold_waiting(root, who, named.lane, id, state, ms(not_before))
redis.call("HSET", KEYS[2], unpack(fields))
redis.call("SET", KEYS[3], ARGV[9])
if ARGV[11] == "1" then redis.call("SET", KEYS[6], id .. " " .. ARGV[10]) end
if ARGV[21] ~= "" then note_retries(KEYS[11], now, ARGV[21], id) end
if named.mode == "async" and not named.batch then list_job(root, who, id, now, give_up_at + tonumber(named.keep_ms)) end
if old then note_retry(root, old, id) end
if not_before <= now then want(KEYS[8], now, tonumber(ARGV[15])) end
return { state, entry }
