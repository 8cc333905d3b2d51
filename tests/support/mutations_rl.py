"""The formulas of fmg.rl, each broken in the ways it could plausibly be wrong."""

from __future__ import annotations

from tests.support.mutation import Mutation

_ADVANTAGES, _GRPO, _NOISE = "fmg.rl.advantages", "fmg.rl.grpo", "fmg.rl.keyed_noise"
_REPLAY, _ROLLOUTS, _RWFM = "fmg.rl.replay", "fmg.rl.rollouts", "fmg.rl.rwfm"
_BRANCHES, _NOISED, _FORWARD = "fmg.rl.branches", "fmg.rl.noised", "fmg.rl.forward"
_REINFORCE, _GRADIENT = "fmg.rl.reinforce", "fmg.rl.reward_gradient"
_CONFIGS, _UPDATE, _WINDOWS = "fmg.rl.configs", "fmg.training.update", "fmg.rl.rollouts"


def _rl(*names: str) -> tuple[str, ...]:
    return tuple(f"rl_identities:check_{name}" for name in names)


def _variant(*names: str) -> tuple[str, ...]:
    return tuple(f"variant_identities:check_{name}" for name in names)


def _branch(*names: str) -> tuple[str, ...]:
    return tuple(f"branch_identities:check_{name}" for name in names)


def _forward(*names: str) -> tuple[str, ...]:
    return tuple(f"forward_identities:check_{name}" for name in names)


def _gradient(*names: str) -> tuple[str, ...]:
    return tuple(f"gradient_identities:check_{name}" for name in names)


_REWARDED = _gradient("reward_gradient_closed_form")
_JUMPS_BEGIN = _gradient("jumps_begin_where_the_method_says")
_LAST_STEP = _gradient("last_step_closed_form")
_DERIVATIVE = _forward("derivatives_agree")
_LEAVE_ONE_OUT = _forward("reinforce_is_the_first_gradient_of_grpo")
_CLOSED_FORM = _rl("advantages_closed_form")
_STEP = _rl("ratio_and_distances_after_a_step")
_RECORD = _rl("rollout_records_what_it_did")
_STAR = _branch("a_star_is_a_chain_with_one_stochastic_step")
_GRID = _branch("the_grid_without_noise_is_the_deterministic_sampler")
_ROWS = _branch("a_star_row_equals_its_repeated_rows")
_GUARD = "ratio_norm_uses_the_noise_of_the_rollout"
_NORM = _variant("ratio_norm_identity", _GUARD)
_WINDOW = _variant("window_positions")
_COMBINED = _variant("per_reward_advantages")

MUTATIONS: tuple[Mutation, ...] = (
    # advantages
    Mutation(_ADVANTAGES, "centred = values - mean[index]", "centred = mean[index] - values", _CLOSED_FORM),
    Mutation(_ADVANTAGES, "centred = values - mean[index]", "centred = values - values.mean()", _CLOSED_FORM),
    Mutation(_ADVANTAGES, "values.std(correction=0)", "values.std()", _CLOSED_FORM),
    Mutation(_ADVANTAGES, "centred.square(), index, count).sqrt()", "centred.square(), index, count)", _CLOSED_FORM),
    Mutation(_ADVANTAGES, "if global_std else group_std", "if not global_std else group_std", _CLOSED_FORM),
    Mutation(_ADVANTAGES, "(std + eps)[index]", "std[index]", _CLOSED_FORM),
    Mutation(_ADVANTAGES, "[index]).clamp(-clip_max, clip_max)", "[index])", _CLOSED_FORM),
    Mutation(_ADVANTAGES, "scaled, 0.0).float()", "scaled, scaled).float()", _rl("equal_rewards_have_no_advantage")),
    Mutation(
        _ADVANTAGES, "return largest[index] > 0", "return largest[index] >= 0", _rl("equal_rewards_have_no_advantage")
    ),
    # ratio, clip, loss
    Mutation(_GRPO, '- rows["log_prob_old"]\n', '+ rows["log_prob_old"]\n', _rl("replay_gives_ratio_one")),
    Mutation(_GRPO, "self._log_ratio(density, rows).exp()", "self._log_ratio(density, rows) + 1", _STEP),
    Mutation(
        _GRPO,
        "return -torch.minimum(ratio * advantage, clipped * advantage)",
        "return torch.minimum(ratio * advantage, clipped * advantage)",
        _rl("clip_is_pessimistic", "first_gradient_is_reinforce"),
    ),
    Mutation(_GRPO, "torch.minimum(", "torch.maximum(", _rl("clip_is_pessimistic")),
    Mutation(
        _GRPO,
        "ratio.clamp(1 - low, 1 + high)",
        "ratio.clamp(max=1 + high)",
        _rl("clip_is_pessimistic") + _variant("clip_higher"),
    ),
    Mutation(_GRPO, '* rows["weight"]).mean()', ").mean()", _rl("weights_scale_rows")),
    Mutation(_GRPO, '* rows["weight"]).mean()', '* rows["weight"]).sum()', _rl("first_gradient_is_reinforce")),
    Mutation(_GRPO, "total + self.config.kl_beta * kl_ref", "total - self.config.kl_beta * kl_ref", _STEP),
    Mutation(
        _GRPO,
        'mean_distance(density.mean, rows["mean_old"], density.std)',
        "density.mean.square()",
        _rl("replay_gives_ratio_one"),
    ),
    Mutation(_GRPO, "replay(self.stochasticizer, reference, batch).mean", "mean", _STEP),
    Mutation(_GRPO, "keys.RATIO_MAX: ratio.max()", "keys.RATIO_MAX: ratio.min()", _STEP),
    Mutation(_GRPO, "(ratio < 1 - low) | (ratio > 1 + high)", "(ratio > 1 + high)", _STEP + _variant("clip_higher")),
    # variants
    Mutation(_GRPO, "ratio.clamp(1 - low, 1 + high)", "ratio.clamp(1 - low, 1 + low)", _variant("clip_higher")),
    Mutation(
        _GRPO, "return min(self.config.clip_bounds)", "return max(self.config.clip_bounds)", _variant("clip_higher")
    ),
    Mutation(_GRPO, "if self.config.ratio_norm:", "if not self.config.ratio_norm:", _variant(_GUARD) + _STEP),
    Mutation(_GRPO, ".flatten(1) / std[:, None]", ".flatten(1)", _NORM),
    Mutation(_GRPO, ".flatten(1) / std[:, None]", ".flatten(1) / std[:, None].square()", _NORM),
    Mutation(
        _GRPO, "(x_s.float() - mean_old.float())", "(x_s.float() - mean.float())", _variant("ratio_norm_identity")
    ),
    Mutation(_GRPO, "(mean.float() - mean_old.float()).flatten(1)", "(mean_old - mean).float().flatten(1)", _NORM),
    Mutation(_GRPO, ".flatten(1)).mean(1)", ".flatten(1)).sum(1)", _NORM),
    Mutation(_GRPO, "return scaled / scaled.mean()", "return scaled", _variant("noise_weights")),
    Mutation(_GRPO, "std**power", "std.square()", _variant("noise_weights")),
    Mutation(_GRPO, "std**power", "std", _branch("noise_weights_take_a_power")),
    Mutation(
        _GRPO,
        "noise_weights(std, self.config.noise_power) if self.config.noise_weighting else torch.ones_like(std)",
        "torch.ones_like(std)",
        _variant("noise_weights"),
    ),
    Mutation(_CONFIGS, "return self.target_kl", "return None", _variant("target_kl_stops")),
    Mutation(_UPDATE, "[keys.APPROX_KL] > kl_limit", "[keys.APPROX_KL] >= kl_limit", _variant("target_kl_stops")),
    Mutation(_UPDATE, "[keys.APPROX_KL] > kl_limit", "[keys.APPROX_KL] < kl_limit", _variant("target_kl_stops")),
    Mutation(_WINDOWS, "iteration // window.every", "iteration", _WINDOW),
    Mutation(_WINDOWS, "steps - 1 - window.size", "steps - window.size", _WINDOW),
    Mutation(_WINDOWS, "min(window.start + moves, last)", "(window.start + moves) % (last + 1)", _WINDOW),
    Mutation(_WINDOWS, "min(window.start + moves, last)", "min(moves, last)", _WINDOW),
    Mutation(_WINDOWS, ".integers(window.start, last + 1)", ".integers(window.start, last)", _WINDOW),
    Mutation(_WINDOWS, "(seed, moves, _WINDOW_STREAM)", "(moves, _WINDOW_STREAM)", _WINDOW),
    Mutation(_WINDOWS, "return tuple(range(steps - 1))", "return tuple(range(steps))", _WINDOW),
    Mutation(
        _ROLLOUTS, "if k not in stochastic:", "if k in ():", _variant("only_the_window_is_stochastic_and_trained")
    ),
    Mutation(_ROLLOUTS, "member=0 if shared else key.member", "member=key.member", _variant("same_initial_noise")),
    Mutation(_ROLLOUTS, "same_initial_noise and step == 0", "same_initial_noise", _variant("same_initial_noise")),
    Mutation(_ADVANTAGES, "weight / whole * own.to(total)", "own.to(total)", _COMBINED),
    Mutation(_ADVANTAGES, "weight / whole * own.to(total)", "weight / whole * rewards[name]", _COMBINED),
    Mutation(_ADVANTAGES, "weight / whole * own", "weight * own", _COMBINED),
    Mutation(_ADVANTAGES, "(total / (total.std(correction=0) + eps))", "total", _COMBINED),
    Mutation(_ADVANTAGES, "total.std(correction=0)", "total.std()", _COMBINED),
    Mutation(_ADVANTAGES, ".clamp(-clip_max, clip_max).float()", ".float()", _COMBINED),
    # divergence and replay
    Mutation(_REPLAY, "/ (2 * std.square())", "/ std.square()", _rl("mean_distance_is_a_kl") + _STEP),
    Mutation(_REPLAY, "/ (2 * std.square())", "/ (2 * std)", _rl("mean_distance_is_a_kl") + _STEP),
    Mutation(_REPLAY, ".flatten(1).mean(1)", ".flatten(1).sum(1)", _rl("mean_distance_is_a_kl") + _STEP),
    Mutation(_REPLAY, 'part.rows["log_prob_old"]).abs()', 'part.rows["log_prob_old"])', _STEP),
    Mutation(_REPLAY, "log_prob_old=log_probs, ", "", _STEP),
    Mutation(_REPLAY, "log_probs[here], means[here], stds", "log_probs[here], _, stds", _STEP),
    # noise and rollout
    Mutation(_NOISE, '",".join(map(str, key))', '",".join(map(str, key[1:]))', _rl("noise_depends_on_its_key_alone")),
    Mutation(_NOISE, ", person=self._person", "", _rl("noise_depends_on_its_key_alone")),
    Mutation(_NOISE, "**start,", "**self._bits.state,", _rl("noise_is_the_documented_generator")),
    Mutation(
        _NOISE,
        ".standard_normal(dtype=np.float32, out=row)",
        ".random(dtype=np.float32, out=row)",
        _rl("noise_is_standard_normal"),
    ),
    Mutation(_ROLLOUTS, "density.push(draw(k + 1))", "density.push(draw(k))", _RECORD),
    Mutation(_ROLLOUTS, "density.push(draw(k + 1))", "density.push(draw(0))", _rl("rollout_keeps_the_path") + _RECORD),
    Mutation(_ROLLOUTS, "density.log_prob(x_s)", "density.log_prob(x)", _RECORD),
    Mutation(_ROLLOUTS, "Transition(k, t, s, x, x_s,", "Transition(k, s, t, x, x_s,", _RECORD),
    Mutation(_ROLLOUTS, "        x = x_s\n", "        x = density.mean\n", _rl("rollout_keeps_the_path") + _RECORD),
    Mutation(
        _ROLLOUTS,
        "key._replace(step=k + 1) for key in chosen",
        "key for key in chosen",
        _rl("sample_is_the_native_sampler"),
    ),
    # branched rollouts
    Mutation(_BRANCHES, "times[step], times[step + 1]", "times[step + 1], times[step]", _STAR),
    Mutation(_BRANCHES, "t, s = times[step], times[step + 1]", "t, s = times[step], times[step + 1] * 0.9", _STAR),
    Mutation(_BRANCHES, "member=member, step=k + 1)", "member=0, step=k + 1)", _STAR),
    Mutation(_BRANCHES, "member=member, step=k + 1)", "member=member, step=k)", _STAR),
    Mutation(_BRANCHES, "range(int(self.step.max()) if", "range(0 if", _STAR),
    Mutation(_BRANCHES, "(self.step > j).nonzero()", "(self.step >= j).nonzero()", _GRID),
    Mutation(_BRANCHES, "(step < j).nonzero()", "(step <= j).nonzero()", _GRID),
    Mutation(_BRANCHES, "range(lowest + 1,", "range(lowest + 2,", _STAR + _GRID),
    Mutation(_BRANCHES, "[step.to(self.device) + 1]", "[step.to(self.device)]", _branch("completions_are_one_jump")),
    Mutation(_BRANCHES, "completing or flow_map", "flow_map", _branch("completions_are_one_jump")),
    Mutation(_BRANCHES, "for sign in (1.0, -1.0)", "for sign in (1.0, 1.0)", _branch("antithetic_siblings_mirror")),
    Mutation(_BRANCHES, "self.step.repeat_interleave", "self.step.repeat", _GRID),
    Mutation(
        _BRANCHES,
        "stars, j + 1, members)",
        "stars, j + 1, None)",
        _branch("a_single_time_map_completes_by_its_sampler"),
    ),
    Mutation(
        _BRANCHES,
        "(sample // self.how.size)",
        "(sample // 1 % 4)",
        _branch("a_single_time_map_completes_by_its_sampler"),
    ),
    Mutation(_BRANCHES, 'prefix == "native"', 'prefix != ""', _branch("the_stochastic_prefix_is_the_kernel")),
    Mutation(_BRANCHES, "self._std[k] ** 2", "self._std[k]", _branch("steps_are_chosen_as_asked")),
    Mutation(_BRANCHES, "floor + (1 - floor *", "(1 - floor *", _branch("steps_are_chosen_as_asked")),
    Mutation(_BRANCHES, "_MEMORY * before", "before", _branch("steps_are_chosen_as_asked")),
    Mutation(
        _BRANCHES, "(self.seed, iteration, _STREAM)", "(self.seed, _STREAM)", _branch("steps_are_chosen_as_asked")
    ),
    Mutation(_BRANCHES, "std(dim=1, correction=0)", "std(dim=1)", _branch("reward_spread_by_step")),
    Mutation(
        _GRPO,
        "else surrogate.mean(1)",
        "else surrogate.sum(1)",
        _ROWS + _branch("the_gradient_has_its_closed_form_and_variance"),
    ),
    Mutation(
        _GRPO, "cond.select(index * size)", "cond.select(index)", _branch("a_group_with_equal_rewards_is_left_out")
    ),
    Mutation(
        _GRPO,
        ".reshape(count, size)[kept]",
        ".reshape(size, count).T[kept]",
        _branch("a_group_with_equal_rewards_is_left_out"),
    ),
    Mutation(_REPLAY, "x_s.unbind(1)], dim=1)", "x_s.flip(1).unbind(1)], dim=1)", _STAR),
    # samples that are noised again
    Mutation(_NOISED, "eps - x_0 if", "x_0 - eps if", _rl("rwfm_targets") + _forward("noised_rows")),
    Mutation(_RWFM, '["advantage"] / self', '["advantage"] * self', _rl("rwfm_targets")),
    Mutation(_RWFM, "temperature, 0) * len(batch)", "temperature, 0)", _rl("rwfm_targets")),
    Mutation(_RWFM, '(batch.rows["weight"] * error).mean()', "error.mean()", _rl("rwfm_targets")),
    Mutation(
        _NOISED,
        "expand(path.sigma(t), x_0) * eps",
        "expand(path.sigma(t).sqrt(), x_0) * eps",
        _rl("rwfm_targets") + _forward("noised_rows"),
    ),
    Mutation(_NOISED, "(1 + (how.time_shift - 1) * t)", "(1 - (how.time_shift - 1) * t)", _forward("noised_rows")),
    Mutation(_NOISED, "kind <= how.diagonal, t,", "kind > how.diagonal, t,", _forward("noised_rows")),
    Mutation(_NOISED, "t * (1 - second)", "t * (1 - first)", _forward("noised_rows")),
    Mutation(_NOISED, "shifted(second).minimum(t)", "second", _forward("ordered_times")),
    Mutation(_NOISED, "return -error / expand", "return error / expand", _forward("velocity_errors")),
    Mutation(_NOISED, "return -error / expand", "return -error * expand", _forward("velocity_errors")),
    Mutation(_NOISED, "x_t + expand(h, x_t) * direction", "x_t - expand(h, x_t) * direction", _DERIVATIVE),
    Mutation(_NOISED, "(t - s).clamp(max=step)", "t.clamp(max=step)", _DERIVATIVE),
    Mutation(_NOISED, "(along, torch.ones_like(at[1])),", "(along, torch.zeros_like(at[1])),", _DERIVATIVE),
    Mutation(_NOISED, "expand(t - s, x_t) * derivative", "derivative", _DERIVATIVE),
    Mutation(_FORWARD, "(errors.old - step)", "(errors.old + step)", _forward("nft_closed_form")),
    Mutation(_FORWARD, "config.adv_clip_max / config.nft_beta", "1 / config.nft_beta", _forward("nft_closed_form")),
    Mutation(_FORWARD, "/ (2 * config.adv_clip_max) + 0.5", "/ config.adv_clip_max + 0.5", _forward("nft_closed_form")),
    Mutation(
        _FORWARD,
        "velocity_error(policies.old, batch) + shared",
        "velocity_error(policies.current, batch) + shared",
        _forward("meanflow_nft_is_nft_on_the_induced_velocity"),
    ),
    Mutation(
        _FORWARD,
        "new = velocity_error(policies.current, batch) + shared",
        "new = velocity_error(policies.current, batch)",
        _forward("meanflow_nft_is_nft_on_the_induced_velocity"),
    ),
    Mutation(
        _FORWARD, "config.old_weight * mean", "-config.old_weight * mean", _forward("mean_flow_advantage_closed_form")
    ),
    Mutation(_FORWARD, "errors.sigma.square() *", "errors.sigma *", _forward("mean_flow_advantage_closed_form")),
    Mutation(_FORWARD, "return -square *", "return square *", _forward("awm_closed_form")),
    Mutation(_FORWARD, "/ self.config.adv_clip_max", "/ 1.0", _forward("awm_closed_form")),
    Mutation(_NOISED, "mean_square(values) / error", "mean_square(values) * error", _forward("nft_closed_form")),
    # further objectives on transitions
    Mutation(_GRPO, "(ratio - 1) * advantage > 0", "(ratio - 1) * advantage < 0", _forward("dppo_mask")),
    Mutation(_GRPO, "kl >= limit", "kl > limit", _forward("dppo_mask")),
    Mutation(_REINFORCE, "* size / (size - 1)", "* (size - 1) / (size - 1)", _LEAVE_ONE_OUT),
    Mutation(_REINFORCE, "total = -(batch", "total = (batch", _LEAVE_ONE_OUT),
    # reward gradients
    Mutation(_GRADIENT, "beta * distance - reward", "beta * distance + reward", _REWARDED),
    Mutation(_GRADIENT, "return Loss(-reward, parts)", "return Loss(-reward.exp(), parts)", _REWARDED),
    Mutation(_GRADIENT, "steps - self.config.jumps)", "steps - 1)", _REWARDED),
    Mutation(_GRADIENT, "policies.reference.jump(x, t, target", "policies.old.jump(x, t, target", _REWARDED),
    Mutation(_GRADIENT, "torch.stack(distances).mean()", "torch.stack(distances).sum()", _REWARDED),
    Mutation(_GRADIENT, "if inner else reached\n", "if inner else reached.detach()\n", _REWARDED),
    Mutation(_GRADIENT, '["renoise"][:, k]', '["renoise"][:, 0]', _REWARDED),
    Mutation(_GRADIENT, "(uniform(keys) * steps)", "(uniform(keys) ** 4 * steps)", _JUMPS_BEGIN),
    Mutation(_GRADIENT, ".repeat(self.config.draws)", ".repeat_interleave(self.config.draws)", _JUMPS_BEGIN),
    Mutation("fmg.flow.path", "path.kernel(torch.zeros_like(s), s)", "path.kernel(s, s)", _JUMPS_BEGIN + _LAST_STEP),
    Mutation(_GRADIENT, "rollout.grid[-2:]", "rollout.grid[:2]", _JUMPS_BEGIN + _LAST_STEP),
    Mutation(_GRADIENT, "inner.total - self._weight * reward", "inner.total + self._weight * reward", _LAST_STEP),
    Mutation(_GRADIENT, "* samples // max(1, len(batch))", "* samples // len(batch) // 2", _LAST_STEP),
)
