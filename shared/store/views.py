"""SQL of the views: what a person would ask the store. Text only; `schema` makes them.

A released view is never changed in place: a new schema drops and makes it anew. `VIEWS` came with schema 1,
`ADAPTER_HISTORY` (in place of the first one) and `ADAPTER_ACTIVATIONS` with schema 2: what an adapter came from, what the
gate said of it, when and by whom it was used.
"""

VIEWS = {
    # acceptance decides; agreement stands in where the model drafter guessed too little to tell (DESIGN: two figures)
    "failures": """
        SELECT created, id, round(acceptance_rate, 3) AS acceptance, round(agreement, 3) AS agreement,
               (SELECT count(*) FROM disagreements d WHERE d.generation_id = g.id) AS disagreements,
               output_count AS tokens, round(tokens_per_second, 1) AS tokens_per_second, adapter_id,
               substr(json_extract(messages, '$[#-1].content'), 1, 120) AS prompt, substr(output, 1, 160) AS output
        FROM generations g
        WHERE coalesce(acceptance_rate, agreement) < (SELECT CAST(value AS REAL) FROM settings WHERE name = 'acceptance_threshold')
        ORDER BY created_at DESC""",
    "acceptance_by_day": """
        SELECT substr(created, 1, 10) AS day, adapter_id, count(*) AS generations, sum(model_drafted) AS drafted,
               round(1.0 * sum(model_accepted) / nullif(sum(model_drafted), 0), 4) AS acceptance,
               round(avg(agreement), 4) AS agreement,
               round(avg(nullif(tokens_per_second, 0)), 2) AS tokens_per_second
        FROM generations GROUP BY day, adapter_id ORDER BY day, adapter_id""",
    "costliest_tokens": """
        SELECT draft_text, target_text, count(*) AS times, round(avg(draft_confidence), 3) AS draft_confidence,
               round(avg(target_confidence), 3) AS target_confidence, draft_token, target_token
        FROM disagreements GROUP BY draft_token, target_token ORDER BY times DESC""",
    "adapter_history": """
        SELECT t.created, t.verdict, t.adapter_id, t.parent_id, t.examples, t.steps, round(t.loss_first, 4) AS loss_first,
               round(t.loss_last, 4) AS loss_last,
               (SELECT round(agreement, 4) FROM evaluations e WHERE e.training_run_id = t.id AND e.subject = 'heldout'
                 AND e.adapter_id = t.parent_id ORDER BY n LIMIT 1) AS heldout_before,
               (SELECT round(agreement, 4) FROM evaluations e WHERE e.training_run_id = t.id AND e.subject = 'heldout'
                 AND e.adapter_id <> t.parent_id ORDER BY n LIMIT 1) AS heldout_after,
               t.reason
        FROM training_runs t ORDER BY t.created_at DESC""",
}

_SCORE = """(SELECT {what} FROM evaluations e WHERE e.training_run_id = t.id AND e.subject = '{subject}'
                 AND e.adapter_id {which} t.parent_id ORDER BY n LIMIT 1)"""


def _score(subject: str, which: str, what: str = "round(agreement, 4)") -> str:
    return _SCORE.format(subject=subject, which=which, what=what)


def _detail(name: str) -> str:
    return _score("heldout", "<>", f"round(json_extract(e.details, '$.{name}'), 4)")


# one row a run of the trainer, imports included; parent_id is what the candidate was compared with
ADAPTER_HISTORY = f"""
    SELECT t.created, t.verdict, t.adapter_id, t.parent_id, t."trigger" AS caused_by,
           json_extract(t.settings, '$.data.failures') AS failures,
           json_extract(t.settings, '$.data.successes') AS successes,
           json_extract(t.settings, '$.data.replay') AS replay,
           t.examples, t.steps, t.tokens, round(t.loss_first, 4) AS loss_first, round(t.loss_last, 4) AS loss_last,
           {_score("heldout", "=")} AS heldout_before, {_score("heldout", "<>")} AS heldout_after,
           {_detail("low")} AS gain_low, {_detail("high")} AS gain_high,
           {_score("heldout", "<>", "generations")} AS heldout_generations,
           {_score("regression", "=")} AS regression_before, {_score("regression", "<>")} AS regression_after,
           (SELECT count(*) FROM activations a WHERE a.event = 'activated' AND a.adapter_id = t.adapter_id
             AND t.adapter_id <> '') AS activations,
           t.reason, t.id AS run_id
    FROM training_runs t ORDER BY t.created_at DESC"""

# who: promoted (by the gate), by hand, restart (the daemon came back), watch (it was rolled back)
ADAPTER_ACTIVATIONS = """
    SELECT created, adapter_id, event,
           CASE WHEN event = 'rolled_back' OR reason LIKE 'adapter % was rolled back' THEN 'watch'
                WHEN reason LIKE '%by hand%' THEN 'by hand'
                WHEN reason = 'restart' THEN 'restart'
                WHEN event = 'rejected' THEN 'verification'
                ELSE 'promoted' END AS who,
           previous_id, reason
    FROM activations ORDER BY n"""
