// The tile sizes of all kernels in sm90/: for plan.cpp, which depends on every one of them.
#pragma once

#include "sm90/tiles/backward.h"
#include "sm90/tiles/forward.h"
