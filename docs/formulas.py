r"""What each strategy computes, in TeX, for the pages of the reference; docstrings have it for a terminal.

A_t = ∂Ω_t/∂θ and B_t = ∂Ω_t/∂φ along the run, d = ∂f/∂θ and c = ∂f/∂φ at its end, as in concepts.md.
"""

FORMULAS = {
    "ReverseUnroll": r"\nabla h = c + \sum_{t=1}^{T} d\, A_T A_{T-1} \cdots A_{t+1} B_t",
    "TruncatedReverse": r"\hat g = c + \sum_{t=T-K+1}^{T} d\, A_T A_{T-1} \cdots A_{t+1} B_t",
    "FirstOrder": r"\hat g = c + d\, \frac{\partial \Omega_0}{\partial\varphi}",
    "ForwardUnroll": r"\nabla h = d\, Z_T + c, \qquad Z_t = A_t Z_{t-1} + B_t",
    "ForwardGradient": r"\hat g = \frac{1}{b} \sum_{i=1}^{b} \langle \nabla h, v_i \rangle\, v_i, \qquad "
    r"\langle \nabla h, v \rangle = d\, Z_T v + c\, v, \qquad Z_t v = A_t Z_{t-1} v + B_t v",
    "ImplicitGradient": r"\hat g = c - d\, H^{-1} \frac{\partial^2 g}{\partial\theta\, \partial\varphi}, "
    r"\qquad H = \frac{\partial^2 g}{\partial\theta^2}",
    "PenaltyGradient": r"\hat g = \frac{\partial f}{\partial\varphi}(y) + \lambda \Big( "
    r"\frac{\partial g}{\partial\varphi}(y) - \frac{\partial g}{\partial\varphi}(z) \Big), \qquad "
    r"z = \arg\min_\theta g, \qquad y = \arg\min_\theta\, g + f / \lambda",
    "GammaGreedy": r"\hat g = c + \sum_{t=1}^{T} \gamma^{T-t}\, \nabla_\theta f(\theta_t)\, B_t",
    "FSLA": r"v_k = v_{k-1} + \beta \Big( \frac{\partial f}{\partial\theta} - H v_{k-1} \Big), \qquad "
    r"\nabla f_k = \frac{\partial f}{\partial\varphi} - \frac{\partial^2 g}{\partial\varphi\, \partial\theta} v_k, "
    r"\qquad \hat g = \nabla f_k + (1 - \eta) (\hat g_{k-1} - \nabla f_{k-1})",
    "SOBA": r"\hat g = \frac{\partial f}{\partial\varphi} - \frac{\partial^2 g}{\partial\varphi\, \partial\theta} v, "
    r"\qquad v \leftarrow v - \beta \Big( H v - \frac{\partial f}{\partial\theta} \Big)",
    "BOME": r"\hat g = \frac{\partial f}{\partial\varphi} + \lambda \frac{\partial q}{\partial\varphi}, \qquad "
    r"q = g(\theta, \varphi) - g(\theta_T, \varphi), \qquad "
    r"\lambda = \max \Big( 0, \frac{\kappa - \langle \nabla f, \nabla q \rangle}{\|\nabla q\|^2} \Big)",
    "MEHA": r"\hat g = \frac{\partial f}{\partial\varphi}(\theta) + c_k \Big( "
    r"\frac{\partial g}{\partial\varphi}(\theta) - \frac{\partial g}{\partial\varphi}(\omega) \Big), \qquad "
    r"\omega \approx \arg\min_\omega\, g(\omega) + \frac{\|\omega - \theta\|^2}{2\gamma}",
    "DARTS": r"\hat g = c + "
    r"\frac{\partial_\varphi g(w + \epsilon u) - \partial_\varphi g(w - \epsilon u)}{2 \epsilon}, "
    r"\qquad w = \theta_{T-1}, \qquad u = - \eta\, d",
    "EvoGrad": r"\hat g = c - \frac{1}{\tau} \sum_{k=1}^{K} w_k\, \langle d, \theta_k - \theta^* \rangle\, "
    r"\partial_\varphi g(\theta_k, \varphi), \qquad w = \mathrm{softmax}_k (-g(\theta_k, \varphi) / \tau), "
    r"\qquad \theta^* = \sum_k w_k \theta_k",
    "PES": r"\hat g = \frac{1}{2 b \mu} \sum_{i=1}^{b} "
    r"\big( h(\varphi + \mu v_i;\, s_i^+) - h(\varphi - \mu v_i;\, s_i^-) \big)\, V_i, "
    r"\qquad V_i = \sum_{k} v_i^{(k)}",
    "PZOBO": r"\hat g = c + \frac{1}{Q} \sum_{j=1}^{Q} \langle "
    r"\frac{\theta_T(\varphi + \mu u_j) - \theta_T(\varphi)}{\mu},\, d \rangle\, u_j, \qquad u_j \sim N(0, I)",
    "ZerothOrder": r"\hat g = \frac{1}{b} \sum_{i=1}^{b} \frac{h(\varphi + \mu v_i) - h(\varphi)}{\mu}\, v_i",
}
