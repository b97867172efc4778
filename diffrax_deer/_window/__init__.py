from .base import (
    AbstractElimination as AbstractElimination,
    AbstractWindow as AbstractWindow,
    is_finite as is_finite,
    Iterate as Iterate,
    up_to_front as up_to_front,
)
from .control import (
    controls as controls,
    has_tree as has_tree,
    with_controls as with_controls,
)
from .discretisation import Discretisation as Discretisation
from .interpolation import (
    grid_time as grid_time,
    time_at as time_at,
    uniform_steps as uniform_steps,
    WindowInterpolationFactory as WindowInterpolationFactory,
)
from .one_step import (
    AbstractMapWindow as AbstractMapWindow,
    Substep as Substep,
)
from .quadrature import Split as Split, Whole as Whole
from .reals import ravel as ravel, unravel_like as unravel_like
from .rounding import (
    among_neighbours as among_neighbours,
    is_noisy as is_noisy,
    nearby as nearby,
    noise as noise,
    noise_of_linear as noise_of_linear,
)
from .scheme import (
    leaves_read as leaves_read,
    precision as precision,
    Scheme as Scheme,
)
from .stage_interpolation import interpolation_of as interpolation_of
from .stages import StageWindow as StageWindow
from .tableau import Tableau as Tableau, tableau_of as tableau_of
