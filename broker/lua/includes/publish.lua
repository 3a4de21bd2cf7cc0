-- Carries one frame to the api processes that have readers of the job: "<id> <attempt>-<seq> <kind>\n<bytes>".
-- The log is the truth; a lost message is refilled from it.
local function publish(channel_prefix, apis, id, attempt, seq, kind, data)
  if not apis or apis == "" then return end
  local message = id .. " " .. attempt .. "-" .. seq .. " " .. kind .. "\n" .. data
  for api in string.gmatch(apis, "[^,]+") do redis.call("PUBLISH", channel_prefix .. api, message) end
end
