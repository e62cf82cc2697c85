// The tile sizes of all kernels in sm80/: for plan.cpp, which depends on every one of them.
#pragma once

#include "sm80/tiles/backward.h"
#include "sm80/tiles/bias_gradient.h"
#include "sm80/tiles/forward.h"
#include "sm80/tiles/forward_split.h"
