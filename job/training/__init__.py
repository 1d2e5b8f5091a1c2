from job.common.packages import require

require("torch")
