"""placeholder"""


class MoE: ...
