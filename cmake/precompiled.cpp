// Carries the precompiled header that every library and test reuses (see the top CMakeLists.txt).
