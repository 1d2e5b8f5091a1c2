from job import require

require("torch")
