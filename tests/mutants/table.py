"""Mutants as data: one change each that breaks the promise, and the tests that must notice."""

from dataclasses import dataclass

BEYOND = "beyond the list"
ITEMS = (
    "sigma C -> sigma",
    "noise missing on one parameter",
    "noise reused across micro-batches or steps",
    "clip after sum",
    "clip by batch mean",
    "loss shape [B,1]",
    "K repeat",
    "divide by real batch size",
    "q from len(data)",
    "shuffle sampler",
    "fixed seed",
    "empty batch skipped",
    "NaN kept",
    "EMA fed clean gradients",
    "a second un-noised optimiser",
    "latent std from data",
    "accountant step dropped on resume",
    "debit after read",
    "refund on failure",
    "retry with a new key and one debit",
    "same key with new data",
    "epsilons added instead of events composed",
    "add/remove accountant for replace-one data",
    "float32 noise",
    "train loss logged",
)


@dataclass(frozen=True)
class Mutant:
    """One broken promise.

    Args:
        name: Words with underscores.
        stands_for: One of ITEMS, or BEYOND.
        file: What is changed.
        old: Its exact text there; occurs once.
        new: What it becomes.
        killers: Tests that must fail, as path::name or path::name[parameters].
        fails_by: Names of refusals of the code that, where the test expects none or another, count like an assertion.
    """

    name: str
    stands_for: str
    file: str
    old: str
    new: str
    killers: tuple[str, ...]
    fails_by: tuple[str, ...] = ()


PRIVACY = "dpldm_core/privacy"
ACCOUNTING, BOOKS, BUDGET, CALIBRATION = (
    f"{PRIVACY}/{name}.py" for name in ("accounting", "books", "budget", "calibration")
)
CHAIN, CLIPPING, ENGINE, LAYERS = (f"{PRIVACY}/{name}.py" for name in ("chain", "clipping", "engine", "layers"))
LEDGER, NOISE, ONE_SHOT, PLAN = (f"{PRIVACY}/{name}.py" for name in ("ledger", "noise", "one_shot", "plan"))
DISCRETE, OPACUS, REPORT = (f"{PRIVACY}/{name}.py" for name in ("discrete", "opacus_backend", "report"))
RNG, LOSS, SPLIT = "dpldm_core/rng.py", "dpldm_core/diffusion/loss.py", "dpldm_core/data/split.py"
TRAINING = "dpldm_core/training"
LOOP, STATE, STAGES, UNITS, DIFFUSION, AUTOENCODER = (
    f"{TRAINING}/{name}.py" for name in ("private", "state", "stages", "units", "diffusion", "autoencoder")
)

_T = "tests/privacy/test_{}.py::test_"
T_ACCOUNTING, T_BUDGET, T_CALIBRATION, T_CLIPPING = map(_T.format, ("accounting", "budget", "calibration", "clipping"))
T_ENGINE, T_GUARDS, T_LEDGER, T_NOISE = map(_T.format, ("engine", "guards", "ledger", "noise"))
T_DISCRETE, T_ONE_PLACE, T_ONE_SHOT = map(_T.format, ("discrete", "one_place", "one_shot"))
T_PLAN, T_REPORT = map(_T.format, ("plan", "report"))
T_RNG, T_SPLIT = "tests/test_rng.py::test_", "tests/data/test_split.py::test_"
T_LOOP, T_UNITS, T_STAGES = (f"tests/training/test_{name}.py::test_" for name in ("private", "units", "stage_batches"))
T_DIFFUSION, T_TRAINED = (f"tests/training/test_{name}.py::test_" for name in ("diffusion", "stages"))
T_MEASURING, T_VERIFY = (f"tests/release/test_release_{name}.py::test_" for name in ("measuring", "verify"))
T_TRAPS = "tests/tasks/test_traps.py::test_"
T_PIPELINE = "tests/tasks/test_release_pipeline.py::test_"

_CLEAN_GRADIENT = "draw(units.fetch(torch.arange(units.num_units)), generator)"

MUTANTS = (
    Mutant(
        "noise_without_the_clip_norm",
        "sigma C -> sigma",
        NOISE,
        "noise_multiplier * SENSITIVITY_SLACK / GRID",
        "noise_multiplier * SENSITIVITY_SLACK / self._grid",
        (f"{T_NOISE}noise_is_sigma_times_clip_norm", f"{T_PLAN}noise_and_event_read_the_same_fields"),
    ),
    Mutant(
        "last_parameter_without_noise",
        "noise missing on one parameter",
        ENGINE,
        "self._noise.add(_sum_over_processes(total), noise.result())",
        "self._noise.add(_sum_over_processes(total), noise.result() * (np.arange(total.size) < "
        "total.size - self._clip.parameters[-1].numel()))",
        (f"{T_ENGINE}every_parameter_gets_its_own_noise_of_unit_variance",),
    ),
    Mutant(
        "noise_of_a_micro_batch_added_once_for_each",
        "noise reused across micro-batches or steps",
        ENGINE,
        "            batch = fetch(chosen.clamp(min=0))\n",
        "            batch = fetch(chosen.clamp(min=0))\n"
        "            total += self._noise.add(np.zeros_like(total), noise.result())\n",
        (f"{T_ENGINE}the_physical_batch_size_changes_nothing",),
    ),
    Mutant(
        "every_step_has_the_noise_of_the_first",
        "noise reused across micro-batches or steps",
        NOISE,
        "self._key.normal(step, size)",
        "self._key.normal(0, size)",
        (
            f"{T_NOISE}every_coordinate_and_every_step_has_its_own_noise",
            f"{T_ENGINE}no_two_coordinates_or_steps_share_noise",
        ),
    ),
    Mutant(
        "noise_drawn_ahead_is_that_of_the_step_before",
        "noise reused across micro-batches or steps",
        ENGINE,
        "self._thread.submit(self._noise.draw, step + 1, size))",
        "self._thread.submit(self._noise.draw, step, size))",
        (f"{T_ENGINE}a_step_is_a_function_of_key_and_step",),
    ),
    Mutant(
        "two_coordinates_share_a_draw",
        "noise reused across micro-batches or steps",
        RNG,
        "radius * np.sin(angle)",
        "radius * np.cos(angle)",
        (f"{T_RNG}pairs_of_normals_are_independent", f"{T_ENGINE}no_two_coordinates_or_steps_share_noise"),
    ),
    Mutant(
        "a_step_may_be_taken_twice",
        "noise reused across micro-batches or steps",
        ENGINE,
        "if step <= self._last_step:",
        "if step < self._last_step:",
        (f"{T_ENGINE}a_step_taken_before_is_refused",),
    ),
    Mutant(
        "the_whole_sum_is_clipped",
        "clip after sum",
        CLIPPING,
        "factors = torch.where(usable, (self.max_norm / norms).clamp(max=1.0), 0.0)",
        "whole = torch.cat([s.flatten() for part in parts for _, s in part.weighted_sums(usable.float())])\n"
        "        factors = torch.where(usable, (self.max_norm / whole.norm()).clamp(max=1.0), 0.0)",
        (
            f"{T_CLIPPING}equals_batch_of_one_autograd",
            f"{T_CLIPPING}neighbours_differ_by_at_most_the_clip_norm",
        ),
    ),
    Mutant(
        "every_unit_is_scaled_by_the_mean_norm",
        "clip by batch mean",
        CLIPPING,
        "(self.max_norm / norms).clamp(max=1.0)",
        "(self.max_norm / norms.mean()).clamp(max=1.0)",
        (
            f"{T_CLIPPING}equals_batch_of_one_autograd",
            f"{T_CLIPPING}neighbours_differ_by_at_most_the_clip_norm",
        ),
    ),
    Mutant(
        "a_loss_of_shape_b_1_is_let_through",
        "loss shape [B,1]",
        CLIPPING,
        "if loss.shape != (units,):",
        "if loss.numel() > units:",
        (f"{T_CLIPPING}a_loss_that_would_broadcast_is_refused",),
    ),
    Mutant(
        "opacus_lets_a_loss_of_shape_b_1_through",
        "loss shape [B,1]",
        OPACUS,
        "if losses.shape != (units,):",
        "if len(losses) != units:",
        (f"{T_GUARDS}opacus_refuses_a_loss_that_would_broadcast",),
    ),
    Mutant(
        "noise_draws_repeated_along_the_batch",
        "K repeat",
        LOSS,
        "noisy.reshape(n * draws, dim), sigma.flatten(), labels).view(n, draws, dim)",
        "noisy.transpose(0, 1).reshape(n * draws, dim), sigma.T.flatten(), class_labels.repeat(draws))"
        ".view(draws, n, dim).transpose(0, 1)",
        (f"{T_STAGES}the_sum_is_that_of_units_clipped_alone[denoiser-0.001]",),
    ),
    Mutant(
        "the_check_before_training_is_left_out",
        "K repeat",
        ENGINE,
        "        check_bounded(model, loss, probe)\n",
        "",
        (
            f"{T_ENGINE}noise_multiplicity_by_repeat_is_refused",
            f"{T_ENGINE}what_is_not_bounded_is_refused_before_private_data_is_read",
        ),
    ),
    Mutant(
        "the_noisy_sum_is_divided_by_the_real_batch_size",
        "divide by real batch size",
        ENGINE,
        "self._noise.add(_sum_over_processes(total), noise.result())",
        "self._noise.add(_sum_over_processes(total), noise.result()) / max((indices >= 0).sum(), 1)",
        (f"{T_ENGINE}a_step_is_sampling_then_clipping_then_noise", f"{T_ENGINE}record_and_replay_on_neighbours"),
    ),
    Mutant(
        "the_sampler_takes_its_rate_from_the_private_number",
        "q from len(data)",
        PLAN,
        "max(int(self.sample_rate * 2.0**64), 1)",
        "max(int(min(1.0, 10.0 / num_units) * 2.0**64), 1)",
        (
            f"{T_PLAN}neighbours_get_the_same_batch_but_for_the_unit_added",
            f"{T_PLAN}a_unit_is_in_the_batch_when_its_draw_is_below_q",
        ),
    ),
    Mutant(
        "the_shape_of_batches_follows_the_private_number",
        "q from len(data)",
        PLAN,
        "        return self.max_batch_size\n",
        "        return min(self.max_batch_size, num_units)\n",
        (f"{T_PLAN}a_cap_that_cuts_too_often_is_refused",),
    ),
    Mutant(
        "batches_of_a_shuffled_epoch",
        "shuffle sampler",
        PLAN,
        "chosen = np.flatnonzero(draws <= np.uint64(max(int(self.sample_rate * 2.0**64), 1) - 1))",
        "parts = max(round(1 / self.sample_rate), 1)\n"
        "        chosen = np.sort(np.argsort(key.uint64(step // parts, num_units))[step % parts :: parts])",
        (f"{T_PLAN}batches_are_poisson",),
    ),
    Mutant(
        "batches_of_fixed_size",
        "shuffle sampler",
        PLAN,
        "chosen = np.flatnonzero(draws <= np.uint64(max(int(self.sample_rate * 2.0**64), 1) - 1))",
        "chosen = np.sort(np.argsort(draws)[: round(self.sample_rate * num_units)])",
        (f"{T_PLAN}batches_are_poisson", f"{T_PLAN}neighbours_get_the_same_batch_but_for_the_unit_added"),
    ),
    Mutant(
        "keys_are_constant",
        "fixed seed",
        RNG,
        "return SecretKey(os.urandom(KEY_BYTES))",
        "return SecretKey(bytes(KEY_BYTES))",
        (f"{T_RNG}keys_come_from_the_operating_system", f"{T_LEDGER}a_new_execution_gets_new_noise[sqlite]"),
    ),
    Mutant(
        "noise_has_a_constant_key",
        "fixed seed",
        ENGINE,
        'plan.noise(key.derive("noise"))',
        'plan.noise(SecretKey(bytes(32)).derive("noise"))',
        (f"{T_ENGINE}noise_and_batches_depend_on_the_key_alone",),
    ),
    Mutant(
        "batches_have_a_constant_key",
        "fixed seed",
        ENGINE,
        'self._sampling_key, self._noise = key.derive("poisson")',
        'self._sampling_key, self._noise = SecretKey(bytes(32)).derive("poisson")',
        (f"{T_ENGINE}noise_and_batches_depend_on_the_key_alone",),
    ),
    Mutant(
        "draws_of_the_loss_have_a_public_seed",
        "fixed seed",
        LOOP,
        "generator = draws_key.generator(state.step)",
        "generator = np.random.default_rng(state.step)",
        (f"{T_LOOP}draws_change_from_step_to_step_and_repeat_with_the_key", f"{T_LOOP}draws_are_as_secret_as_the_key"),
    ),
    Mutant(
        "an_empty_batch_makes_no_noise",
        "empty batch skipped",
        ENGINE,
        "        total = np.zeros(self._clip.num_parameters)\n",
        "        total = np.zeros(self._clip.num_parameters)\n"
        "        if (indices < 0).all():\n            return self._set_gradients(total)\n",
        (f"{T_ENGINE}an_empty_batch_is_a_step_like_any_other",),
    ),
    Mutant(
        "an_empty_batch_is_filled_with_a_record",
        "empty batch skipped",
        PLAN,
        "        if len(chosen) > cap:",
        "        chosen = chosen if len(chosen) else np.array([int(draws[0]) % num_units])\n"
        "        if len(chosen) > cap:",
        (f"{T_PLAN}empty_batches_stay_empty", f"{T_ENGINE}an_empty_batch_is_a_step_like_any_other"),
    ),
    Mutant(
        "a_unit_that_is_not_finite_is_not_dropped",
        "NaN kept",
        CLIPPING,
        "usable = mask & torch.isfinite(norms)",
        "usable = mask",
        (f"{T_CLIPPING}a_record_that_is_not_finite_contributes_nothing",),
    ),
    Mutant(
        "a_dropped_unit_is_multiplied_by_zero",
        "NaN kept",
        CLIPPING,
        "                part.drop(usable)\n",
        "                pass\n",
        (f"{T_CLIPPING}a_record_that_is_not_finite_contributes_nothing",),
    ),
    Mutant(
        "a_sum_that_is_not_finite_is_released",
        "NaN kept",
        NOISE,
        "        if not np.isfinite(clipped_sum).all():\n",
        "        clipped_sum = np.nan_to_num(clipped_sum, posinf=0.0, neginf=0.0)\n"
        "        if not np.isfinite(clipped_sum).all():\n",
        (f"{T_NOISE}a_sum_that_is_not_finite_is_not_released",),
    ),
    Mutant(
        "a_vector_that_is_not_finite_is_not_dropped",
        "NaN kept",
        ONE_SHOT,
        "rows = torch.where(torch.isfinite(rows).all(1, keepdim=True), rows, torch.zeros_like(rows))",
        "rows = rows.clone()",
        (f"{T_ONE_SHOT}one_unit_moves_the_sum_by_at_most_one",),
    ),
    Mutant(
        "padding_of_a_unit_holds_record_zero",
        "NaN kept",
        UNITS,
        "        values[records < 0] = 0.0",
        "        values = values",
        (f"{T_UNITS}what_a_unit_holds_moves_no_other_unit",),
    ),
    Mutant(
        "the_average_takes_a_step_along_the_clean_gradient",
        "EMA fed clean gradients",
        LOOP,
        "        state.ema.update(model, state.step)\n",
        "        state.ema.update(model, state.step)\n"
        f"        clean = torch.autograd.grad(loss(model, {_CLEAN_GRADIENT}).mean(), trainable)\n"
        "        for average, gradient in zip(state.ema.model.parameters(), clean, strict=True):\n"
        "            average.sub_(0.01 * gradient)\n",
        (f"{T_LOOP}the_model_depends_on_the_data_through_noisy_gradients_alone",),
    ),
    Mutant(
        "plain_sgd_beside_adam",
        "a second un-noised optimiser",
        LOOP,
        "        optimizer.step()\n",
        "        optimizer.step()\n"
        "        optimizer.zero_grad()\n"
        f"        loss(model, {_CLEAN_GRADIENT}).mean().backward()\n"
        "        torch.optim.SGD(trainable, lr=0.01).step()\n",
        (f"{T_LOOP}the_model_depends_on_the_data_through_noisy_gradients_alone",),
    ),
    Mutant(
        "noise_levels_scaled_by_the_std_of_the_latents",
        "latent std from data",
        DIFFUSION,
        "draw=lambda batch, generator: draw_diffusion(batch, generator, config, model.sigma_data),",
        "draw=lambda batch, generator: draw_diffusion(batch, generator, config, float(units.values.std())),",
        (f"{T_STAGES}the_batch_of_a_unit_does_not_depend_on_another_unit[denoiser]",),
    ),
    Mutant(
        "the_prior_is_measured_in_coordinates_scaled_by_the_private_std",
        "latent std from data",
        STAGES,
        "        white = whitening(encoder.transform.latent_shape)\n",
        "        white = torch.diag(1 / units.values.std(0))\n",
        (f"{T_DIFFUSION}no_latent_reaches_a_mechanism_through_another_or_the_network_before_its_noise",),
    ),
    Mutant(
        "the_denoiser_is_pretrained_on_the_private_latents",
        "a second un-noised optimiser",
        STAGES,
        "        curve = pretrain_denoiser(model.to(run.device), encoder, config.diffusion, seed=config.seed)\n",
        "        model, curve = train_denoiser_on_released(\n"
        '            model, tensors["latents"], tensors["labels"], config.diffusion, num_steps=2, batch_size=9, '
        "seed=0\n"
        "        )\n",
        (f"{T_DIFFUSION}no_latent_reaches_a_mechanism_through_another_or_the_network_before_its_noise",),
    ),
    Mutant(
        "the_teachers_features_are_learnt_from_private_images",
        "a second un-noised optimiser",
        STAGES,
        "    learn_features(teacher, images, labels, config.teacher, seed=config.seed)\n",
        "    learn_features(teacher, records.images, records.labels, config.teacher, seed=config.seed)\n",
        (f"{T_TRAINED}the_teacher_learns_its_features_from_other_samples_than_are_published",),
    ),
    Mutant(
        "latents_standardised_by_their_own_mean_and_std",
        "latent std from data",
        STAGES,
        "units = _units(records, encode(model, to_tensor(records.images)), config)",
        "z = encode(model, to_tensor(records.images))\n    units = _units(records, (z - z.mean(0)) / z.std(0), config)",
        (f"{T_UNITS}replacing_a_person_moves_their_own_rows_alone",),
    ),
    Mutant(
        "a_resumed_run_takes_its_last_step_again",
        "accountant step dropped on resume",
        STATE,
        "        self.step = step\n        return True",
        "        self.step = step - 1\n        return True",
        (
            f"{T_LOOP}resuming_an_older_checkpoint_forgets_no_step",
            f"{T_LOOP}resuming_at_every_step_equals_the_uninterrupted_run",
        ),
    ),
    Mutant(
        "the_event_counts_one_step_too_few",
        "accountant step dropped on resume",
        PLAN,
        "self.noise_multiplier, self.num_steps)",
        "self.noise_multiplier, self.num_steps - 1)",
        (f"{T_PLAN}noise_and_event_read_the_same_fields", f"{T_LOOP}exactly_the_steps_that_are_charged_are_run"),
    ),
    Mutant(
        "one_step_more_than_charged",
        "accountant step dropped on resume",
        ENGINE,
        "if not 0 <= step < self.plan.num_steps:",
        "if not 0 <= step <= self.plan.num_steps:",
        (f"{T_ENGINE}a_step_that_is_not_charged_is_refused",),
    ),
    Mutant(
        "a_stage_is_booked_after_it_got_its_key",
        "debit after read",
        LEDGER,
        "        self._chain.append(decide)\n        assert secret is not None\n",
        "        self._book_later = lambda: self._chain.append(decide)\n        assert secret is not None\n",
        (f"{T_LEDGER}debit_comes_before_the_key[sqlite]",),
    ),
    Mutant(
        "the_data_is_opened_before_the_budget_is_reserved",
        "debit after read",
        "tasks/opening.py",
        "    ledger = open_ledger()\n    run_id",
        "    decide(request, data_root=data_root(), cache_dir=download_folder())\n"
        "    ledger = open_ledger()\n    run_id",
        (f"{T_PIPELINE}the_budget_is_asked_before_the_data_is_opened",),
        fails_by=("DataError",),
    ),
    Mutant(
        "a_failed_stage_is_refunded",
        "refund on failure",
        LEDGER,
        "            if entry.stages:\n",
        '            if entry.stages and "published" in entry.state:\n',
        (f"{T_LEDGER}no_refund_after_a_read[sqlite]",),
    ),
    Mutant(
        "a_failed_release_does_not_count",
        "refund on failure",
        BOOKS,
        'e.state != "cancelled"]',
        'e.state not in ("cancelled", "failed")]',
        (f"{T_LEDGER}no_refund_after_a_read[sqlite]",),
    ),
    Mutant(
        "every_retry_gets_a_new_key",
        "retry with a new key and one debit",
        LEDGER,
        'return SecretKey(secret).derive("stage", stage, data_digest, plan_digest, code_digest)',
        'return SecretKey.generate().derive("stage", stage)',
        (f"{T_LEDGER}a_retry_finds_its_reservation_and_the_same_keys[sqlite]",),
    ),
    Mutant(
        "changed_data_are_not_noticed",
        "same key with new data",
        LEDGER,
        "if hmac.compare_digest(entry.stages[stage], binding):",
        "if entry.stages[stage]:",
        (f"{T_LEDGER}the_same_key_with_changed_data_or_code_is_refused",),
    ),
    Mutant(
        "the_binding_leaves_out_the_data",
        "same key with new data",
        LEDGER,
        "_binding(secret, stage, data_digest, plan_digest, code_digest)",
        "_binding(secret, stage, plan_digest, code_digest)",
        (f"{T_LEDGER}the_same_key_with_changed_data_or_code_is_refused[sqlite-data_digest]",),
    ),
    Mutant(
        "a_checkpoint_of_other_data_is_resumed",
        "same key with new data",
        STATE,
        "if binding != self.binding:",
        "if not binding:",
        (f"{T_LOOP}a_checkpoint_of_another_binding_is_refused",),
    ),
    Mutant(
        "the_binding_of_a_checkpoint_leaves_out_the_data",
        "same key with new data",
        STAGES,
        "    digest.update(Path(data).read_bytes())\n",
        "",
        (f"{T_STAGES}a_checkpoint_is_bound_to_the_private_file_and_the_plan",),
    ),
    Mutant(
        "epsilons_of_events_are_added",
        "epsilons added instead of events composed",
        ACCOUNTING,
        "    accountant = PLDAccountant(relation, interval)\n",
        "    if len(events) > 1:\n"
        "        return sum(epsilon([e], delta, relation, interval=interval) for e in events)\n"
        "    accountant = PLDAccountant(relation, interval)\n",
        (f"{T_ACCOUNTING}events_are_composed_never_their_epsilons_added", f"{T_ACCOUNTING}anchors"),
    ),
    Mutant(
        "the_cheapest_release_is_left_out_of_the_bill",
        "epsilons added instead of events composed",
        PLAN,
        "return [m.event() for m in self.mechanisms]",
        "return [m.event() for m in self.mechanisms][:-1] or [m.event() for m in self.mechanisms]",
        (f"{T_PLAN}every_mechanism_is_charged",),
    ),
    Mutant(
        "the_accountant_never_replaces",
        "add/remove accountant for replace-one data",
        ACCOUNTING,
        "    accountant = PLDAccountant(relation, interval)\n",
        "    accountant = PLDAccountant(NeighboringRelation.ADD_OR_REMOVE_ONE, interval)\n",
        (
            f"{T_ACCOUNTING}gaussian_equals_the_closed_form_from_above",
            f"{T_ACCOUNTING}replacing_costs_more_than_adding_or_removing",
        ),
    ),
    Mutant(
        "a_replace_one_release_is_billed_under_add_or_remove",
        "add/remove accountant for replace-one data",
        BOOKS,
        'name = "REPLACE_ONE" if "REPLACE_ONE" in relations else opened.relation',
        "name = opened.relation",
        (f"{T_LEDGER}one_replace_one_release_moves_the_whole_bill[sqlite]",),
    ),
    Mutant(
        "records_that_show_their_number_are_stated_under_add_or_remove",
        "add/remove accountant for replace-one data",
        PLAN,
        "if isinstance(m, GaussianRecordPlan | LabelPlan):",
        "if isinstance(m, LabelPlan):",
        (f"{T_PLAN}outputs_that_show_their_number_have_no_add_or_remove_statement[records]",),
    ),
    Mutant(
        "noise_is_drawn_in_float32",
        "float32 noise",
        NOISE,
        "np.rint(self._std_in_grid * self._key.normal(step, size))",
        "np.rint(np.float32(self._std_in_grid) * self._key.normal(step, size).astype(np.float32))",
        (f"{T_NOISE}noise_fills_the_grid_as_float32_could_not",),
    ),
    Mutant(
        "radii_come_from_32_bits",
        "float32 noise",
        RNG,
        "uniform = words[0] * 2.0**-64 + (words[1] + 0.5) * 2.0**-128",
        "uniform = ((words[0] >> np.uint64(32)) + 0.5) * 2.0**-32",
        (f"{T_RNG}normal_has_tails_that_float32_cannot_have", f"{T_RNG}radii_do_not_lie_on_a_lattice"),
    ),
    Mutant(
        "the_loss_is_printed",
        "train loss logged",
        LOOP,
        "        state.step += 1\n",
        f"        state.step += 1\n        print(float(loss(model, {_CLEAN_GRADIENT}).detach().mean()))\n",
        (f"{T_LOOP}callbacks_and_logs_get_public_numbers_alone",),
    ),
    Mutant(
        "the_real_batch_size_is_logged",
        "train loss logged",
        ENGINE,
        "        total = np.zeros(self._clip.num_parameters)\n",
        "        total = np.zeros(self._clip.num_parameters)\n"
        '        __import__("logging").getLogger("dpldm").info("batch of %d", (indices >= 0).sum())\n',
        (f"{T_LOOP}callbacks_and_logs_get_public_numbers_alone",),
    ),
    Mutant(
        "the_gradient_norm_is_reported",
        "train loss logged",
        LOOP,
        "            on_step(state.step, plan.num_steps)",
        "            on_step(state.step, float(sum(p.grad.square().sum() for p in trainable)))",
        (f"{T_LOOP}callbacks_and_logs_get_public_numbers_alone",),
    ),
    # Beyond the list: noise and its slack
    Mutant(
        "the_slack_of_the_sensitivity_is_not_paid",
        BEYOND,
        NOISE,
        "SENSITIVITY_SLACK = 1.001",
        "SENSITIVITY_SLACK = 1.0",
        (f"{T_NOISE}no_less_noise_is_drawn_than_the_event_charges",),
    ),
    Mutant(
        "low_bits_of_the_sum_leave",
        BEYOND,
        NOISE,
        "return self._grid * (np.rint(clipped_sum.astype(np.float64) / self._grid).astype(np.int64) + noise)",
        "return clipped_sum.astype(np.float64) + self._grid * noise",
        (f"{T_NOISE}only_multiples_of_the_grid_leave",),
    ),
    Mutant(
        "more_coordinates_than_the_slack_covers",
        BEYOND,
        NOISE,
        "MAX_COORDINATES = int((0.25e-3 / GRID) ** 2)",
        "MAX_COORDINATES = int((0.25 / GRID) ** 2)",
        (f"{T_NOISE}the_slack_covers_the_rounding_of_the_largest_model",),
    ),
    Mutant(
        "every_process_adds_noise",
        BEYOND,
        ENGINE,
        "self._noise.add(_sum_over_processes(total), noise.result())",
        "_sum_over_processes(self._noise.add(total, noise.result()))",
        (f"{T_ENGINE}two_processes_make_the_step_of_one_with_the_noise_added_once",),
    ),
    Mutant(
        "a_key_shows_in_logs",
        BEYOND,
        RNG,
        "    secret: bytes = field(repr=False)\n",
        "    secret: bytes = field()\n",
        (f"{T_RNG}a_key_hides_from_logs",),
    ),
    # Beyond the list: clip and sampler
    Mutant(
        "rounding_of_bfloat16_is_not_charged",
        BEYOND,
        LAYERS,
        '"bfloat16": (1 + 2.0**-8) ** 2 - 1}',
        '"bfloat16": 0.0}',
        (f"{T_ENGINE}bfloat16_products_pass_the_bound_of_float32",),
    ),
    Mutant(
        "rounding_of_float32_is_not_charged",
        BEYOND,
        LAYERS,
        "ROUNDING = 1e-5",
        "ROUNDING = 0.0",
        (f"{T_GUARDS}no_unit_whose_rows_cancel_exceeds_the_clip",),
    ),
    Mutant(
        "the_norm_leaves_out_the_bias",
        BEYOND,
        LAYERS,
        "float(self.bias is not None)",
        "0.0",
        (f"{T_CLIPPING}equals_batch_of_one_autograd", f"{T_CLIPPING}neighbours_differ_by_at_most_the_clip_norm"),
    ),
    Mutant(
        "products_in_the_precision_of_the_process",
        BEYOND,
        CLIPPING,
        "    torch.set_float32_matmul_precision(name)\n",
        "    torch.set_float32_matmul_precision(before)\n",
        (f"{T_ENGINE}what_the_process_uses_outside_does_not_reach_the_clip",),
    ),
    Mutant(
        "padding_rows_count",
        BEYOND,
        ENGINE,
        "mask = (chosen >= 0)",
        "mask = (chosen >= -1)",
        (
            f"{T_ENGINE}a_step_is_sampling_then_clipping_then_noise",
            f"{T_ENGINE}an_empty_batch_is_a_step_like_any_other",
        ),
    ),
    Mutant(
        "a_layer_may_run_twice",
        BEYOND,
        CLIPPING,
        "if any(name == seen for seen, _, _ in self._calls):",
        "if False:",
        (f"{T_CLIPPING}a_layer_that_runs_twice_is_refused",),
    ),
    Mutant(
        "weights_may_be_shared",
        BEYOND,
        CLIPPING,
        "if any(p is q for p in own for q in self.parameters):",
        "if False:",
        (f"{T_CLIPPING}layers_that_cannot_be_bounded_are_refused",),
    ),
    Mutant(
        "batch_norm_is_let_through",
        BEYOND,
        CLIPPING,
        "            if isinstance(layer, nn.modules.batchnorm._BatchNorm):\n"
        "                check_layer(name, layer)\n",
        "",
        (f"{T_GUARDS}batch_norm_without_weights_is_refused_by_name",),
    ),
    Mutant(
        "a_cut_batch_keeps_the_first_records",
        BEYOND,
        PLAN,
        'np.sort(chosen[np.argsort(draws[chosen], kind="stable")[:cap]])',
        "chosen[:cap]",
        (f"{T_PLAN}a_cut_batch_keeps_the_smallest_draws",),
    ),
    Mutant(
        "a_cap_below_the_rate_is_taken",
        BEYOND,
        PLAN,
        "if self.max_batch_size < min(needed, num_units):",
        "if self.max_batch_size < self.sample_rate * num_units:",
        (f"{T_PLAN}a_cap_that_cuts_too_often_is_refused",),
    ),
    Mutant(
        "records_of_a_person_count_one_by_one",
        BEYOND,
        UNITS,
        '"weights": present / present.sum(1, keepdim=True).clamp(min=1.0),',
        '"weights": present,',
        (f"{T_UNITS}the_weights_of_a_unit_sum_to_one",),
    ),
    Mutant(
        "every_record_of_a_person_is_a_unit",
        BEYOND,
        STAGES,
        "table = group_table(records, config.max_records_per_group if records.schema.grouped else 1)",
        "table = np.arange(len(records.labels))[:, None]",
        (f"{T_STAGES}a_person_is_one_unit_in_both_stages",),
    ),
    Mutant(
        "a_buffer_may_keep_private_values",
        BEYOND,
        ENGINE,
        "if changed := [name for name, b in twin.named_buffers() if not torch.equal(b, buffers[name])]:",
        "if changed := []:",
        (f"{T_GUARDS}a_buffer_that_a_forward_pass_changes_is_refused",),
    ),
    # Beyond the list: one-shot mechanisms
    Mutant(
        "moments_weigh_more_than_one",
        BEYOND,
        ONE_SHOT,
        "CLASS_MOMENTS = Split(0.1, 0.5, math.sqrt(1 - 0.1**2 - 0.5**2))",
        "CLASS_MOMENTS = Split(0.1, 0.5, 1.0)",
        (f"{T_ONE_SHOT}one_unit_moves_the_sum_by_at_most_one", f"{T_ONE_SHOT}the_sensitivity_is_reached"),
    ),
    Mutant(
        "a_mean_weighs_more_than_one",
        BEYOND,
        ONE_SHOT,
        "MEAN = Split(0.1, math.sqrt(1 - 0.1**2), 0.0)",
        "MEAN = Split(0.1, 1.0, 0.0)",
        (f"{T_GUARDS}the_parts_of_one_record_have_norm_one_together[mean]",),
    ),
    Mutant(
        "counts_of_a_person_are_charged_as_one",
        BEYOND,
        DISCRETE,
        "(Fraction(noise_multiplier) * max_records) ** 2",
        "Fraction(noise_multiplier) ** 2",
        (f"{T_DISCRETE}the_plan_draws_what_it_charges_and_the_smoothing",),
    ),
    Mutant(
        "smoothing_of_the_discrete_gaussian_is_not_paid",
        BEYOND,
        DISCRETE,
        " ** 2 + SMOOTHING_VARIANCE",
        " ** 2",
        (f"{T_DISCRETE}the_plan_draws_what_it_charges_and_the_smoothing",),
    ),
    Mutant(
        "vectors_are_not_clipped",
        BEYOND,
        ONE_SHOT,
        ".clamp(min=1e-30)).clamp(max=1.0)",
        ".clamp(min=1e-30)).clamp(min=1.0)",
        (f"{T_ONE_SHOT}one_unit_moves_the_sum_by_at_most_one",),
    ),
    Mutant(
        "latents_of_a_person_are_clipped_record_by_record",
        BEYOND,
        ONE_SHOT,
        "plan.max_norm / math.sqrt(records_per_unit)",
        "plan.max_norm",
        (f"{T_ONE_SHOT}released_records_are_the_clipped_ones_when_noise_is_negligible",),
    ),
    Mutant(
        "all_records_share_one_noise",
        BEYOND,
        ONE_SHOT,
        "noise.draw(i, row.size)",
        "noise.draw(0, row.size)",
        (f"{T_ONE_SHOT}every_record_has_its_own_noise_of_the_unit_s_norm",),
    ),
    Mutant(
        "moments_of_another_sensitivity_are_taken",
        BEYOND,
        ONE_SHOT,
        "if plan.max_norm != 1.0:",
        "if plan.max_norm < 1.0:",
        (f"{T_ONE_SHOT}moments_of_another_sensitivity_are_refused",),
    ),
    Mutant(
        "labels_are_replaced_half_as_often",
        BEYOND,
        PLAN,
        "math.ceil(self.noise_parameter * 2.0**64)",
        "math.ceil(self.noise_parameter * 2.0**63)",
        (f"{T_PLAN}labels_are_replaced_as_charged", f"{T_PLAN}the_coin_at_its_edges"),
    ),
    Mutant(
        "one_label_of_a_person_is_charged",
        BEYOND,
        PLAN,
        "self.noise_parameter, self.num_classes, self.labels_per_unit)",
        "self.noise_parameter, self.num_classes, 1)",
        (f"{T_ONE_PLACE}released_labels_do_what_their_event_says",),
    ),
    Mutant(
        "the_number_of_released_latents_is_that_of_the_records",
        BEYOND,
        STAGES,
        "        kept = _full_rows(units.table)\n",
        "        kept = units.table[units.table >= 0]\n",
        (f"{T_UNITS}released_latents_do_not_tell_how_many_records_a_person_has",),
    ),
    Mutant(
        "the_split_hashes_places_under_add_or_remove",
        BEYOND,
        SPLIT,
        '    if by == "position":\n',
        "    if by:\n",
        (f"{T_SPLIT}removing_a_record_moves_no_other",),
    ),
    # Beyond the list: what is published
    Mutant(
        "the_released_accuracy_has_no_noise",
        BEYOND,
        "dpldm_core/release/measuring.py",
        "noisy_histogram(mechanism, key, wrong.astype(np.int64), table).tolist()",
        "(int((~wrong).sum()), int(wrong.sum()))",
        (f"{T_MEASURING}no_held_out_record_is_no_special_case",),
    ),
    Mutant(
        "an_accuracy_is_published_without_a_charge",
        BEYOND,
        CALIBRATION,
        "    if config.publish_metrics:",
        "    if False:",
        (f"{T_CALIBRATION}a_published_accuracy_takes_its_share_and_no_more",),
    ),
    Mutant(
        "a_report_is_believed",
        BEYOND,
        REPORT,
        "        epsilon = accounting.epsilon(events, delta, relation)\n",
        '        epsilon = report["epsilon"]\n',
        (f"{T_VERIFY}a_report_that_its_events_contradict_fails_with_every_hash_right",),
    ),
    Mutant(
        "the_lineage_names_the_private_file_by_its_digest",
        BEYOND,
        "tasks/_tracking.py",
        'self._dataset(uri, "private_data", "training", digest="private")',
        'self._dataset(uri, "private_data", "training", digest=__import__("hashlib").md5(Path(uri).read_bytes())'
        ".hexdigest())",
        (f"{T_TRAPS}no_fingerprint_of_private_data_leaves",),
    ),
    # Beyond the list: accounting
    Mutant(
        "epsilon_is_rounded_down_to_the_grid",
        BEYOND,
        ACCOUNTING,
        "return float(accountant.get_epsilon(delta * (1.0 - TRUNCATION_DELTA_SHARE)))",
        "return math.floor(accountant.get_epsilon(delta * (1.0 - TRUNCATION_DELTA_SHARE)) / 0.01) * 0.01",
        (f"{T_ACCOUNTING}gaussian_equals_the_closed_form_from_above",),
    ),
    Mutant(
        "the_promise_rounds_epsilon_down",
        BEYOND,
        REPORT,
        "return nearest if nearest >= epsilon else math.ceil(epsilon * 1000) / 1000",
        "return nearest",
        (f"{T_REPORT}rounding_never_understates",),
    ),
    Mutant(
        "no_delta_is_kept_back_for_cut_batches",
        BEYOND,
        ACCOUNTING,
        "accountant.get_epsilon(delta * (1.0 - TRUNCATION_DELTA_SHARE))",
        "accountant.get_epsilon(delta)",
        (f"{T_ACCOUNTING}the_share_of_delta_for_cut_batches_is_kept_back",),
    ),
    Mutant(
        "cut_batches_of_many_releases_are_not_charged",
        BEYOND,
        BUDGET,
        "needed = (1.0 + math.exp(min(spent, 700.0))) * truncation",
        "needed = 0.0",
        (f"{T_BUDGET}cut_batches_of_all_releases_are_charged",),
    ),
    Mutant(
        "a_plan_is_calibrated_with_batches_cut_too_often",
        BEYOND,
        CALIBRATION,
        "accounting.TRUNCATION_DELTA_SHARE * delta / (4 * num_steps",
        "delta / (4 * num_steps",
        (f"{T_CALIBRATION}four_stages_of_cut_batches_fit_the_share",),
    ),
    Mutant(
        "randomized_response_is_charged_once",
        BEYOND,
        ACCOUNTING,
        "accountant.compose(_written_out(compose(events)))",
        "accountant.compose(compose(events))",
        (f"{T_ACCOUNTING}randomized_response_equals_enumeration_from_above",),
    ),
    Mutant(
        "disagreeing_accountants_publish",
        BEYOND,
        ACCOUNTING,
        "if not agree or not math.isfinite(ours):",
        "if not math.isfinite(ours):",
        (
            f"{T_ACCOUNTING}disagreement_with_prv_publishes_nothing",
            f"{T_ACCOUNTING}a_pld_below_its_lower_alarm_publishes_nothing",
        ),
    ),
    Mutant(
        "a_replacement_counts_as_one_change",
        BEYOND,
        BUDGET,
        "changes = 2.0 if relation is NeighboringRelation.REPLACE_ONE else 1.0",
        "changes = 1.0 if relation is NeighboringRelation.REPLACE_ONE else 1.0",
        (f"{T_BUDGET}a_hold_costs_what_was_asked",),
    ),
    Mutant(
        "a_plan_chosen_later_composes_as_pld",
        BEYOND,
        BUDGET,
        "return any(c.fixed_at > read for i, c in enumerate(claims) for read, j in reads if i != j)",
        "return False",
        (f"{T_LEDGER}a_plan_chosen_after_an_output_needs_the_renyi_filter[sqlite]",),
    ),
    Mutant(
        "cohorts_compose_in_parallel_under_replace_one",
        BEYOND,
        BUDGET,
        "if relation is not NeighboringRelation.ADD_OR_REMOVE_ONE or not cohorts:",
        "if not cohorts:",
        (f"{T_LEDGER}cohorts_do_not_help_under_replace_one[sqlite]",),
    ),
    # Beyond the list: ledger
    Mutant(
        "hashes_of_the_chain_are_not_checked",
        BEYOND,
        CHAIN,
        "if row.seq != expected or row.hash != link_hash(previous, row.seq, row.time, row.kind, row.body):",
        "if row.seq != expected:",
        (f"{T_LEDGER}an_edited_ledger_is_refused[sqlite-body]", f"{T_LEDGER}an_edited_ledger_is_refused[sqlite-time]"),
    ),
    Mutant(
        "the_head_of_the_chain_is_not_checked",
        BEYOND,
        CHAIN,
        "if (head.seq, head.hash) != (len(links), previous):",
        "if head.seq < 0:",
        (f"{T_LEDGER}an_edited_ledger_is_refused[sqlite-tail removed]",),
    ),
    Mutant(
        "the_head_is_moved_without_compare_and_swap",
        BEYOND,
        CHAIN,
        "        if connection.execute(swap).rowcount != 1:",
        "        if connection.execute(swap).rowcount < 0:",
        (f"{T_BUDGET}a_writer_whose_head_was_moved_decides_anew",),
        fails_by=("LedgerError",),
    ),
    Mutant(
        "the_cap_is_not_asked",
        BEYOND,
        LEDGER,
        "            after.check(account, release_id)\n",
        "",
        (f"{T_LEDGER}refused_past_the_cap_and_nothing_is_written[sqlite]",),
    ),
    Mutant(
        "the_cap_gives_way_by_a_thousandth",
        BEYOND,
        BOOKS,
        "TOLERANCE = 1e-9",
        "TOLERANCE = 1e-3",
        (f"{T_BUDGET}a_cap_is_met_to_the_last_digit_and_not_passed",),
    ),
    Mutant(
        "a_cap_can_be_met_no_more",
        BEYOND,
        BOOKS,
        "<= account.budget_epsilon * (1 + TOLERANCE)",
        "< account.budget_epsilon * (1 - TOLERANCE)",
        (f"{T_BUDGET}a_cap_is_met_to_the_last_digit_and_not_passed",),
        fails_by=("BudgetError",),
    ),
    Mutant(
        "opening_an_account_again_raises_its_cap",
        BEYOND,
        LEDGER,
        "if budget_epsilon > known.budget_epsilon and not public:",
        "if budget_epsilon < 0:",
        (f"{T_LEDGER}only_the_explicit_command_raises_a_cap[sqlite]",),
    ),
    Mutant(
        "a_larger_delta_is_taken",
        BEYOND,
        LEDGER,
        "if delta > account.delta and not account.public:",
        "if delta > 1.0 and not account.public:",
        (f"{T_LEDGER}a_larger_delta_than_the_accounts_is_refused[sqlite]",),
    ),
    Mutant(
        "keys_outlive_their_release",
        BEYOND,
        LEDGER,
        'return Change("publish", body, destroy_secret=entry_id)',
        'return Change("publish", body)',
        (f"{T_LEDGER}keys_are_destroyed_after_publish[sqlite]",),
    ),
    Mutant(
        "a_deleted_key_stays_in_the_file",
        BEYOND,
        CHAIN,
        '("synchronous=FULL", "secure_delete=ON")',
        '("synchronous=FULL", "secure_delete=OFF")',
        (f"{T_LEDGER}a_destroyed_key_is_gone_from_the_sqlite_file",),
    ),
    Mutant(
        "a_bound_plan_can_be_changed",
        BEYOND,
        LEDGER,
        "if entry.plan is None or entry.plan.digest() != plan_digest:",
        "if entry.plan is None:",
        (f"{T_LEDGER}another_plan_or_stage_gets_no_key[sqlite]",),
    ),
    Mutant(
        "a_stage_outside_the_plan_gets_a_key",
        BEYOND,
        LEDGER,
        "if stage not in {m.stage for m in entry.plan.mechanisms}:",
        "if not stage:",
        (f"{T_LEDGER}another_plan_or_stage_gets_no_key[sqlite]",),
    ),
    Mutant(
        "the_plan_digest_leaves_out_the_mechanisms",
        BEYOND,
        PLAN,
        'self.model_dump(mode="json"), sort_keys',
        'self.model_dump(mode="json", exclude={"mechanisms"}), sort_keys',
        (f"{T_PLAN}the_digest_names_the_whole_plan",),
    ),
    Mutant(
        "the_ledger_is_readable_by_all",
        BEYOND,
        CHAIN,
        "path.touch(mode=0o600)",
        "path.touch(mode=0o644)",
        (f"{T_LEDGER}the_file_is_its_owners_alone",),
    ),
)
