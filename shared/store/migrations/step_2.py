"""Schema 2: the whole story of an adapter (data, interval, regression) in `adapter_history`; `adapter_activations`."""

STATEMENTS = (
    "DROP VIEW adapter_history",
    """CREATE VIEW adapter_history AS 
    SELECT t.created, t.verdict, t.adapter_id, t.parent_id, t."trigger" AS caused_by,
           json_extract(t.settings, '$.data.failures') AS failures,
           json_extract(t.settings, '$.data.successes') AS successes,
           json_extract(t.settings, '$.data.replay') AS replay,
           t.examples, t.steps, t.tokens, round(t.loss_first, 4) AS loss_first, round(t.loss_last, 4) AS loss_last,
           (SELECT round(agreement, 4) FROM evaluations e WHERE e.training_run_id = t.id AND e.subject = 'heldout'
                 AND e.adapter_id = t.parent_id ORDER BY n LIMIT 1) AS heldout_before, (SELECT round(agreement, 4) FROM evaluations e WHERE e.training_run_id = t.id AND e.subject = 'heldout'
                 AND e.adapter_id <> t.parent_id ORDER BY n LIMIT 1) AS heldout_after,
           (SELECT round(json_extract(e.details, '$.low'), 4) FROM evaluations e WHERE e.training_run_id = t.id AND e.subject = 'heldout'
                 AND e.adapter_id <> t.parent_id ORDER BY n LIMIT 1) AS gain_low, (SELECT round(json_extract(e.details, '$.high'), 4) FROM evaluations e WHERE e.training_run_id = t.id AND e.subject = 'heldout'
                 AND e.adapter_id <> t.parent_id ORDER BY n LIMIT 1) AS gain_high,
           (SELECT generations FROM evaluations e WHERE e.training_run_id = t.id AND e.subject = 'heldout'
                 AND e.adapter_id <> t.parent_id ORDER BY n LIMIT 1) AS heldout_generations,
           (SELECT round(agreement, 4) FROM evaluations e WHERE e.training_run_id = t.id AND e.subject = 'regression'
                 AND e.adapter_id = t.parent_id ORDER BY n LIMIT 1) AS regression_before, (SELECT round(agreement, 4) FROM evaluations e WHERE e.training_run_id = t.id AND e.subject = 'regression'
                 AND e.adapter_id <> t.parent_id ORDER BY n LIMIT 1) AS regression_after,
           (SELECT count(*) FROM activations a WHERE a.event = 'activated' AND a.adapter_id = t.adapter_id
             AND t.adapter_id <> '') AS activations,
           t.reason, t.id AS run_id
    FROM training_runs t ORDER BY t.created_at DESC""",
    """CREATE VIEW adapter_activations AS 
    SELECT created, adapter_id, event,
           CASE WHEN event = 'rolled_back' OR reason LIKE 'adapter % was rolled back' THEN 'watch'
                WHEN reason LIKE '%by hand%' THEN 'by hand'
                WHEN reason = 'restart' THEN 'restart'
                WHEN event = 'rejected' THEN 'verification'
                ELSE 'promoted' END AS who,
           previous_id, reason
    FROM activations ORDER BY n""",
)
