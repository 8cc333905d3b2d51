"""The formulas of fmg.flow and fmg.stochasticizers, each broken in the ways it could plausibly be wrong."""

from __future__ import annotations

from tests.support.mutation import Mutation

_PATH, _GAUSSIAN, _GRIDS = "fmg.flow.path", "fmg.flow.gaussian", "fmg.flow.grids"
_MAPS, _ANALYTIC, _SAMPLING = "fmg.flow.maps", "fmg.flow.analytic", "fmg.flow.sampling"
_ASFMC, _VELOCITY, _CONFIGS = (f"fmg.stochasticizers.{name}" for name in ("asfmc", "velocity", "configs"))


def _flow(*names: str) -> tuple[str, ...]:
    return tuple(f"flow_identities:check_{name}" for name in names)


def _stochastic(*names: str) -> tuple[str, ...]:
    return tuple(f"stochasticizer_identities:check_{name}" for name in names)


_MARGINALS = _stochastic("exact_kernels_preserve_the_path")

MUTATIONS: tuple[Mutation, ...] = (
    # paths: coefficients and rates
    Mutation(_PATH, "return 1 - check_times(t)", "return 1 - check_times(t).square()", _flow("path_coefficients")),
    Mutation(
        _PATH,
        "return torch.sin((1 - check_times(t)) * _HALF_PI)",
        "return torch.cos(check_times(t) * _HALF_PI)",
        _flow("path_coefficients"),
    ),
    Mutation(_PATH, "_HALF_PI = math.pi / 2", "_HALF_PI = math.pi / 4", _flow("path_coefficients")),
    Mutation(_PATH, "return -one, one", "return one, one", _flow("path_rates", "gaussian_map_velocity")),
    Mutation(_PATH, "return -_HALF_PI * self.sigma(t)", "return -self.sigma(t)", _flow("path_rates")),
    Mutation(_PATH, "_HALF_PI * self.alpha(t)\n", "self.alpha(t)\n", _flow("path_rates")),
    Mutation(_PATH, "_HALF_PI * self.alpha(t)\n", "-_HALF_PI * self.alpha(t)\n", _flow("path_rates")),
    # paths: kernel, noise share and its inverse
    Mutation(_PATH, "self.alpha(s) / alpha_a)", "self.alpha(s))", _flow("kernel_moments") + _MARGINALS),
    Mutation(_PATH, "return scale, variance.sqrt()", "return scale, variance", _flow("kernel_moments") + _MARGINALS),
    Mutation(
        _PATH,
        "(s - a) * (s * (1 - a) + a * (1 - s)) / alpha_a.square()",
        "(s - a).square()",
        _flow("kernel_moments", "noise_share") + _MARGINALS,
    ),
    Mutation(
        _PATH,
        "(s - a) * (s * (1 - a) + a * (1 - s)) / alpha_a.square()",
        "s.square() - (alpha_a.reciprocal() * (1 - s) * a).square()",
        _flow("kernel_precision"),
    ),
    Mutation(
        _PATH,
        "torch.sin((s - a) * _HALF_PI) * torch.sin(total * _HALF_PI)",
        "torch.sin((s - a) * _HALF_PI).square()",
        _flow("kernel_moments") + _MARGINALS,
    ),
    Mutation(_PATH, "(1 - a) + (1 - s), a + s)", "a + s, (1 - a) + (1 - s))", _flow("kernel_precision")),
    Mutation(
        _PATH,
        "scale = torch.where(same, 1.0, self.alpha(s) / alpha_a)",
        "scale = self.alpha(s) / self.alpha(a)",
        _flow("kernel_at_equal_times"),
    ),
    Mutation(
        _PATH, "self.sigma(a) * self.alpha(s) / denominator", "self.sigma(a) / self.sigma(s)", _flow("noise_share")
    ),
    Mutation(
        _PATH,
        "torch.where(noise == 0, 1.0, 1 - s + noise)",
        "torch.where(noise == 0, 1.0, 1 - s)",
        _flow("anchor_inverts_noise_share"),
    ),
    Mutation(
        _PATH,
        "torch.atan2(m * self.sigma(s), self.alpha(s))",
        "m * torch.asin(self.sigma(s))",
        _flow("anchor_inverts_noise_share"),
    ),
    # Gaussian
    Mutation(_GAUSSIAN, "- self.std.log() - _HALF_LOG_2PI", "- _HALF_LOG_2PI", _flow("gaussian_density")),
    Mutation(_GAUSSIAN, "_HALF_LOG_2PI = 0.5 *", "_HALF_LOG_2PI =", _flow("gaussian_density")),
    Mutation(_GAUSSIAN, "return -0.5 * _row_mean", "return -_row_mean", _flow("gaussian_density")),
    Mutation(
        _GAUSSIAN,
        "(x.float() - self.mean) / expand",
        "(x.float() - self.mean) * expand",
        _flow("gaussian_density", "gaussian_divergence"),
    ),
    Mutation(_GAUSSIAN, ".mean(dim=1)", ".sum(dim=1)", _flow("gaussian_density", "gaussian_divergence")),
    Mutation(
        _GAUSSIAN,
        "self.mean + expand(self.std, self.mean) * noise",
        "self.mean + expand(self.std.sqrt(), self.mean) * noise",
        _flow("gaussian_push"),
    ),
    Mutation(_GAUSSIAN, "(self.std / other.std)", "(other.std / self.std)", _flow("gaussian_divergence")),
    Mutation(_GAUSSIAN, "- 1 - ratio.log()", "- 1 + ratio.log()", _flow("gaussian_divergence")),
    Mutation(
        _GAUSSIAN, "other._standardised(self.mean)", "self._standardised(other.mean)", _flow("gaussian_divergence")
    ),
    Mutation(
        _GAUSSIAN,
        "return -_row_mean((self._standardised(x) * expand(self.std, self.mean)).square())",
        "return -_row_mean(self._standardised(x).square())",
        _flow("unscaled_density"),
    ),
    # grids
    Mutation(_GRIDS, "_PAPER_LAST = 0.05", "_PAPER_LAST = 0.0147", _flow("grids")),
    Mutation(_GRIDS, "/ (steps - 1)", "/ steps", _flow("grids")),
    Mutation(_GRIDS, "(shift * t + (1 - t))", "(shift * t + 1)", _flow("grids")),
    Mutation(_GRIDS, "(tokens - low) / (high - low)", "tokens / high", _flow("grids")),
    Mutation(_GRIDS, "math.sin(angle) / (math.sin(angle) + math.cos(angle))", "math.sin(angle)", _flow("grids")),
    Mutation(_GRIDS, "_SCM_TWO_STEP_ANGLE = 1.3", "_SCM_TWO_STEP_ANGLE = math.pi / 4", _flow("grids")),
    # adapters
    Mutation(
        _MAPS,
        "x_t - expand(t - s, x_t) * self.network(x_t, t, s, cond)",
        "x_t + expand(t - s, x_t) * self.network(x_t, t, s, cond)",
        _flow("two_time_map"),
    ),
    Mutation(
        _MAPS,
        "x_t - expand(t - s, x_t) * self.network(x_t, t, s, cond)",
        "x_t - expand(t, x_t) * self.network(x_t, t, s, cond)",
        _flow("two_time_map"),
    ),
    Mutation(_MAPS, "self.network(x_t, t, s, cond)", "self.network(x_t, s, t, cond)", _flow("two_time_map")),
    Mutation(
        _MAPS,
        "self.average_velocity(x_t, t, t, cond)",
        "self.average_velocity(x_t, t, 0 * t, cond)",
        _flow("two_time_map"),
    ),
    Mutation(
        _MAPS, "return x_t - expand(t, x_t) *", "return x_t -", _flow("single_time_map", "trigflow_wrapper_cancels")
    ),
    Mutation(_MAPS, "time = sine / (sine + cosine)", "time = sine", _flow("trigflow_wrapper_cancels")),
    Mutation(_MAPS, "z = x_t / expand(sine + cosine, x_t)", "z = x_t", _flow("trigflow_wrapper_cancels")),
    Mutation(_MAPS, "return z - expand(time, x_t) *", "return z -", _flow("trigflow_wrapper_cancels")),
    Mutation(_GRIDS, "_SCM_TWO_STEP_ANGLE / (math.pi / 2)", "_SCM_TWO_STEP_ANGLE / 2", _flow("grids")),
    # few-step sampler
    Mutation(
        _SAMPLING,
        "flow_map.jump(x, t, s, cond)",
        "flow_map.jump(x, t, torch.zeros_like(s), cond)",
        _flow("native_sampler_keeps_the_path"),
    ),
    Mutation(
        _PATH,
        "expand(scale, x_0) * x_0 + expand(std, x_0) * eps",
        "x_0 + expand(std, x_0) * eps",
        _flow("native_sampler_keeps_the_path"),
    ),
    Mutation(
        _PATH,
        "expand(std, x_0) * eps",
        "expand(std.square(), x_0) * eps",
        _flow("native_sampler_keeps_the_path"),
    ),
    Mutation(
        _SAMPLING,
        "renoised(flow_map.path, x_0, s, renoise())",
        "renoised(flow_map.path, x_0, t, renoise())",
        _flow("native_sampler_keeps_the_path"),
    ),
    # exact maps
    Mutation(
        _ANALYTIC,
        "(self._variances(s) / self._variances(t)).sqrt()",
        "(self._variances(s) / self._variances(t))",
        _flow("gaussian_map_marginals", "gaussian_map_velocity") + _MARGINALS,
    ),
    Mutation(
        _ANALYTIC,
        "signal_rate[:, None] * eigenvalues + noise_rate[:, None]",
        "signal_rate[:, None] * eigenvalues - noise_rate[:, None]",
        _flow("gaussian_map_velocity"),
    ),
    Mutation(_ANALYTIC, "data = self.means +", "data = self.means -", _flow("mixture_map", "mixture_velocity")),
    Mutation(_ANALYTIC, "d * variances.log()", "variances.log()", _flow("mixture_velocity")),
    Mutation(_ANALYTIC, "h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)", "h / 6 * (k1 + 2 * k2 + k3 + k4)", _flow("mixture_map")),
    # anchored composition
    Mutation(
        _ASFMC,
        "Gaussian(expand(scale, x_t) * flow_map.jump(x_t, t, a, cond), std)",
        "Gaussian(flow_map.jump(x_t, t, a, cond), std)",
        _MARGINALS + _stochastic("asfmc_anchor_rules"),
    ),
    Mutation(
        _ASFMC,
        "flow_map.jump(x_t, t, a, cond)",
        "flow_map.jump(x_t, t, s, cond)",
        _MARGINALS + _stochastic("asfmc_anchor_rules", "exact_kernel_tends_to_euler"),
    ),
    Mutation(
        _ASFMC,
        "scale, std = flow_map.path.kernel(a, s)",
        "scale, std = flow_map.path.kernel(a, s)[0], flow_map.path.sigma(s)",
        _MARGINALS + _stochastic("asfmc_at_the_target_is_the_map", "exact_kernel_tends_to_euler"),
    ),
    Mutation(_ASFMC, "(s - value).clamp_min(0)", "(value - s).clamp_min(0)", _stochastic("asfmc_anchor_rules")),
    Mutation(_ASFMC, "return value * s", "return 1 - value * (1 - s)", _stochastic("asfmc_anchor_rules")),
    Mutation(
        _ASFMC,
        "return flow_map.path.anchor(torch.full_like(s, value), s)",
        "return s * value",
        _stochastic("asfmc_anchor_rules"),
    ),
    Mutation(_CONFIGS, '= ("ratio", 0.9)', '= ("ratio", 0.5)', _stochastic("asfmc_anchor_rules")),
    Mutation(_ASFMC, "endpoint = torch.zeros_like(s)", "endpoint = 0.1 * s", _stochastic("asfmc_at_zero_is_endpoint")),
    Mutation(
        _ASFMC,
        "self.config.noise_level * std)",
        "std)",
        _stochastic("endpoint_noise_level", "baselines_leave_the_path"),
    ),
    Mutation(
        _ASFMC,
        "self.path_preserving = config.noise_level == 1",
        "self.path_preserving = True",
        _stochastic("baselines_leave_the_path"),
    ),
    # first-order form
    Mutation(
        _ASFMC,
        "strength = self.config.strength**2",
        "strength = self.config.strength",
        _stochastic("euler_depends_on_one_product"),
    ),
    Mutation(
        _ASFMC,
        "y / expand(rest, y) + v",
        "y / expand(rest, y) - v",
        _stochastic("exact_kernel_tends_to_euler", "euler_form_preserves_the_path_to_first_order"),
    ),
    Mutation(
        _ASFMC,
        "mean = y - expand(h, y) *",
        "mean = y + expand(h, y) *",
        _stochastic("exact_kernel_tends_to_euler", "euler_form_preserves_the_path_to_first_order"),
    ),
    Mutation(
        _ASFMC,
        "y / expand(rest, y)",
        "y",
        _stochastic("exact_kernel_tends_to_euler", "euler_form_preserves_the_path_to_first_order"),
    ),
    Mutation(
        _ASFMC,
        "(2 * h * s / rest).sqrt()",
        "(h * s / rest).sqrt()",
        _stochastic("exact_kernel_tends_to_euler", "euler_form_preserves_the_path_to_first_order"),
    ),
    Mutation(
        _ASFMC,
        "(2 * h * s / rest).sqrt()",
        "(2 * h * s).sqrt()",
        _stochastic("exact_kernel_tends_to_euler", "euler_form_preserves_the_path_to_first_order"),
    ),
    Mutation(
        _ASFMC,
        "flow_map.velocity(y, s, cond)",
        "flow_map.velocity(x_t, t, cond)",
        _stochastic("exact_kernel_tends_to_euler", "euler_form_preserves_the_path_to_first_order"),
    ),
    Mutation(_ASFMC, "if self.config.detach_velocity:", "if False:", _stochastic("detached_velocity")),
    Mutation(_ASFMC, "if self.config.detach_velocity:", "if True:", _stochastic("detached_velocity")),
    Mutation(_ASFMC, ".clamp_min(floor)", ".clamp_max(floor)", _stochastic("euler_form_as_published")),
    Mutation(
        _ASFMC,
        "torch.minimum(h, s * strength)",
        "torch.maximum(h, s * strength)",
        _stochastic("euler_form_as_published"),
    ),
    Mutation(_ASFMC, "ratio**value**2", "ratio**value", _stochastic("asfmc_anchor_rules")),
    # velocity samplers
    Mutation(
        _VELOCITY, "torch.where(t == 1, s, t)", "torch.where(t == 1, 1 - s, t)", _stochastic("flow_sde_closed_form")
    ),
    Mutation(
        _VELOCITY,
        "x_t * expand(1 + drift * dt, x_t)",
        "x_t * expand(1 - drift * dt, x_t)",
        _stochastic("flow_sde_closed_form", "velocity_sdes_preserve_the_path_in_the_limit"),
    ),
    Mutation(
        _VELOCITY,
        "(1 + drift * (1 - t)) * dt",
        "(1 + drift) * dt",
        _stochastic("flow_sde_closed_form", "velocity_sdes_preserve_the_path_in_the_limit"),
    ),
    Mutation(
        _VELOCITY,
        "drift = eta.square() / (2 * t)",
        "drift = eta.square() / t",
        _stochastic("flow_sde_closed_form", "velocity_sdes_preserve_the_path_in_the_limit"),
    ),
    Mutation(
        _VELOCITY,
        "(t / (1 - torch.where(t == 1, s, t))).sqrt()",
        "(t / (1 - torch.where(t == 1, s, t)))",
        _stochastic("flow_sde_closed_form"),
    ),
    Mutation(
        _VELOCITY,
        "Gaussian(mean, eta * (-dt).sqrt())\n\n\nclass DanceSde",
        "Gaussian(mean, eta * -dt)\n\n\nclass DanceSde",
        _stochastic("flow_sde_closed_form", "velocity_sdes_preserve_the_path_in_the_limit"),
    ),
    Mutation(
        _VELOCITY,
        "0.5 * eta**2 * score",
        "-0.5 * eta**2 * score",
        _stochastic("dance_sde_closed_form", "velocity_sdes_preserve_the_path_in_the_limit"),
    ),
    Mutation(
        _VELOCITY,
        "0.5 * eta**2 * score",
        "0.5 * eta * score",
        _stochastic("dance_sde_closed_form", "velocity_sdes_preserve_the_path_in_the_limit"),
    ),
    Mutation(
        _VELOCITY,
        "expand(t.square(), x_t)",
        "expand(t, x_t)",
        _stochastic("dance_sde_closed_form", "velocity_sdes_preserve_the_path_in_the_limit"),
    ),
    Mutation(
        _VELOCITY,
        "denoised = x_t - expand(t, x_t) * v",
        "denoised = x_t + expand(t, x_t) * v",
        _stochastic("dance_sde_closed_form", "velocity_sdes_preserve_the_path_in_the_limit"),
    ),
    Mutation(
        _VELOCITY,
        "data = x_t - expand(t, x_t) * v",
        "data = x_t + expand(t, x_t) * v",
        _stochastic("cps_closed_form", "cps_at_full_noise_is_endpoint"),
    ),
    Mutation(
        _VELOCITY,
        "noise = x_t + expand(1 - t, x_t) * v",
        "noise = x_t - expand(1 - t, x_t) * v",
        _stochastic("cps_closed_form"),
    ),
    Mutation(_VELOCITY, "s * math.cos(angle)", "s", _stochastic("cps_closed_form", "cps_at_full_noise_is_endpoint")),
    Mutation(
        _VELOCITY,
        "angle = self.config.noise_level * math.pi / 2",
        "angle = self.config.noise_level",
        _stochastic("cps_closed_form", "cps_at_full_noise_is_endpoint"),
    ),
    Mutation(
        _VELOCITY, "UnscaledGaussian if self.config", "Gaussian if self.config", _stochastic("cps_published_log_prob")
    ),
    Mutation(
        _VELOCITY,
        "self.config.noise_level * s)",
        "self.config.noise_level * s.sqrt())",
        _stochastic("naive_noise_closed_form"),
    ),
)
