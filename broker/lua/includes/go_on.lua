-- What becomes of the answer of a held job that is lost. Of one that nobody has seen nothing stands: it starts again.
-- Else another attempt must go on from it, or the job ends.
--   from: the last frame of the log when it was judged that the answer can be gone on from, "-1" = it cannot
-- Returns whether it stands, and whether it goes on; then the refusal where frames have come since that judgement.
local function standing(f, from)
  local stands = (f.state == "streaming" and f.seen == "1") or tonumber(f.continues or 0) > 0
  if not stands or from == "-1" then return stands, false end
  if f.last_seq ~= from then return stands, false, redis.error_reply("MOVED frame " .. f.last_seq .. " is the last") end
  return stands, true
end
