"""Schema 5: codes beside sentences.

`activations.reason` and `training_runs."trigger"` are codes; the sentences that stood there are in
`note` and `cause`. A sentence that no earlier version is known to have written gets the code
`other`. `adapter_activations` tells its `who` by the code, and has the sentence as `note`; a
reinstated adapter says so.
"""

STATEMENTS = (
    "DROP VIEW adapter_history",
    "DROP VIEW adapter_activations",
    "ALTER TABLE activations RENAME COLUMN reason TO note",
    "ALTER TABLE activations ADD COLUMN reason TEXT NOT NULL DEFAULT 'other'",
    """UPDATE activations SET reason = CASE
        WHEN event = 'rejected' THEN 'verification'
        WHEN event = 'rolled_back' THEN 'live_acceptance'
        WHEN note LIKE 'adapter % was rolled back' THEN 'rollback'
        WHEN note = 'announced' THEN 'announced'
        WHEN note = 'restart' THEN 'restart'
        WHEN note = 'by hand' THEN 'by_hand'
        WHEN note = 'by hand, once more' THEN 'by_hand_again'
        WHEN note = 'rolled back by hand' THEN 'rolled_back_by_hand'
        WHEN note = 'reinstated by a second look' THEN 'reinstated'
        ELSE 'other' END""",
    'ALTER TABLE training_runs RENAME COLUMN "trigger" TO cause',
    "ALTER TABLE training_runs ADD COLUMN \"trigger\" TEXT NOT NULL DEFAULT 'other'",
    """UPDATE training_runs SET "trigger" = CASE
        WHEN cause LIKE 'import %' THEN 'import'
        WHEN cause LIKE 'second look at %' THEN 'reevaluation'
        WHEN cause = 'by hand' THEN 'by_hand'
        WHEN cause = 'by hand, now' THEN 'by_hand_now'
        WHEN cause GLOB '[0-9]* failures' THEN 'failures'
        ELSE 'other' END""",
    """CREATE VIEW adapter_history AS
    SELECT t.created, t.verdict, t.adapter_id, t.parent_id, t."trigger", t.cause AS caused_by,
           json_extract(t.settings, '$.data.failures') AS failures,
           json_extract(t.settings, '$.data.successes') AS successes,
           json_extract(t.settings, '$.data.replay') AS replay,
           t.examples, t.steps, t.tokens, round(t.loss_first, 4) AS loss_first, round(t.loss_last, 4) AS loss_last,
           (SELECT round(agreement, 4) FROM evaluations e WHERE e.training_run_id = t.id AND e.subject = 'heldout'
             AND e.adapter_id = t.parent_id ORDER BY n LIMIT 1) AS heldout_before,
           (SELECT round(agreement, 4) FROM evaluations e WHERE e.training_run_id = t.id AND e.subject = 'heldout'
             AND e.adapter_id <> t.parent_id ORDER BY n LIMIT 1) AS heldout_after,
           (SELECT round(json_extract(e.details, '$.low'), 4) FROM evaluations e WHERE e.training_run_id = t.id
             AND e.subject = 'heldout' AND e.adapter_id <> t.parent_id ORDER BY n LIMIT 1) AS gain_low,
           (SELECT round(json_extract(e.details, '$.high'), 4) FROM evaluations e WHERE e.training_run_id = t.id
             AND e.subject = 'heldout' AND e.adapter_id <> t.parent_id ORDER BY n LIMIT 1) AS gain_high,
           (SELECT generations FROM evaluations e WHERE e.training_run_id = t.id AND e.subject = 'heldout'
             AND e.adapter_id <> t.parent_id ORDER BY n LIMIT 1) AS heldout_generations,
           (SELECT round(agreement, 4) FROM evaluations e WHERE e.training_run_id = t.id AND e.subject = 'regression'
             AND e.adapter_id = t.parent_id ORDER BY n LIMIT 1) AS regression_before,
           (SELECT round(agreement, 4) FROM evaluations e WHERE e.training_run_id = t.id AND e.subject = 'regression'
             AND e.adapter_id <> t.parent_id ORDER BY n LIMIT 1) AS regression_after,
           (SELECT count(*) FROM activations a WHERE a.event = 'activated' AND a.adapter_id = t.adapter_id
             AND t.adapter_id <> '') AS activations,
           t.reason, t.id AS run_id
    FROM training_runs t ORDER BY t.created_at DESC""",
    """CREATE VIEW adapter_activations AS
    SELECT created, adapter_id, event,
           CASE WHEN reason IN ('rollback', 'live_acceptance') THEN 'monitor'
                WHEN reason IN ('by_hand', 'by_hand_again', 'rolled_back_by_hand') THEN 'by hand'
                WHEN reason = 'announced' THEN 'promoted'
                ELSE reason END AS who,
           previous_id, reason, note
    FROM activations ORDER BY n""",
)
