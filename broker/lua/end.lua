-- Ends a held job: `finish` after a finish reason, `fail` otherwise. May log one last frame before the terminal one;
-- where that is also the first, the job becomes streaming and ends in one step.
--   KEYS[1] job   KEYS[2] lane   KEYS[3] due   KEYS[4] frames   KEYS[5] request   KEYS[6] readers   KEYS[7] dead
--   ARGV[1] now   ARGV[2] id   ARGV[3] group   ARGV[4] frames_prefix   ARGV[5] control_prefix   ARGV[6] usage_prefix
--   ARGV[7] attempt   ARGV[8] event   ARGV[9] seq of the last frame   ARGV[10] its data, "" = in the log already
--   ARGV[11] code   ARGV[12] message   ARGV[13] status   ARGV[14] served_by   ARGV[15] usage, JSON
--   ARGV[16] prompt_tokens   ARGV[17] cached_tokens, of those   ARGV[18] completion_tokens
-- Returns 1.
-- Errors: NOJOB, ENDED, STALE, BADTRANSITION, GAP.
--- @flags allow-oom
--- @include now_ms
--- @include check
--- @include publish
--- @include enter
--- @include usage
--- @include retries
--- @include close
local now, id = now_ms(ARGV[1]), ARGV[2]
local f = read_job(KEYS[1])
local refusal = holds(f.state, f.attempt, ARGV[7], KEYS[1])
if refusal then return refusal end
local seq, last, set = tonumber(ARGV[9]), tonumber(f.last_seq), { "served_by", ARGV[14] }
local from, to, wrong = f.state, nil, nil
if from == "claimed" and seq == last + 1 then -- its first token comes with its end: two steps in one
  from, wrong = follow(from, "first_token", KEYS[1])
  if not from then return wrong end
  if tonumber(f.continues or 0) == 0 then
    set[3], set[4] = "first_token_at", ms(now)
    f.first_token_at = ms(now)
  end
end
to, wrong = follow(from, ARGV[8], KEYS[1])
if not to then return wrong end
local missing = ARGV[10] == "" and last + 1 or last + 2
if seq >= missing then return redis.error_reply("GAP " .. last .. " then " .. ARGV[9]) end

if seq > last then
  redis.call("XADD", KEYS[4], ARGV[7] .. "-" .. ARGV[9], "kind", "content", "data", ARGV[10])
  publish(ARGV[4], f.apis, id, ARGV[7], ARGV[9], "content", ARGV[10])
  f.last_seq = ARGV[9]
end
if ARGV[15] ~= "" then
  set[#set + 1] = "usage"
  set[#set + 1] = ARGV[15]
end
local who = f.caller .. ":" .. f.model
close({ job = KEYS[1], lane = KEYS[2], due = KEYS[3], frames = KEYS[4], request = KEYS[5], readers = KEYS[6],
  dead = KEYS[7] },
  { group = ARGV[3], frames_prefix = ARGV[4], control_prefix = ARGV[5], usage_prefix = ARGV[6] },
  f, now, id, to, { code = ARGV[11], message = ARGV[12], status = ARGV[13], set = set,
    counts = { "tokens_in:" .. who .. ":false", tonumber(ARGV[16]) - tonumber(ARGV[17]), "tokens_in:" .. who .. ":true",
      ARGV[17], "tokens_out:" .. who, ARGV[18] } })
return 1
