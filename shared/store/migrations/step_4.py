"""Schema 4: indexes for the counts and sums of `status`, which otherwise read through every row's texts and blobs."""

STATEMENTS = (
    "CREATE INDEX ix_generations_drafting ON generations (adapter_id, model_drafted, model_accepted)",
    "CREATE INDEX ix_generations_score ON generations (acceptance_rate, agreement)",
)
